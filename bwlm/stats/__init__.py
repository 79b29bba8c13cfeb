"""Gaps, verdicts, power and scaling laws from tables of losses; knows no folders and no charts."""
