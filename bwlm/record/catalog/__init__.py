"""Runs of a storage: rows, filters, descriptions, and the choice of runs."""
