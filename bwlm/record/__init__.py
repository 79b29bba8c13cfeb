"""What a run leaves behind: the experiment folder, its checkpoints, MLflow."""
