"""The grid: its specification, and the only room that drives Ray Train and Ray Tune."""
