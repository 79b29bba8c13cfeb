"""Launches: the cells of a plan through Ray Tune and Ray Train, with their records and reports."""
