"""The grid: its specification, and the only package that drives Ray Train and Ray Tune."""
