"""Evaluation on tasks, in each direction of reading."""
