"""Trained models: loaded from their runs, and exported with their cards."""
