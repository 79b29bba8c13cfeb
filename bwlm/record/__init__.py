"""Records of a run: the experiment folder, its checkpoints, the research log, MLflow."""
