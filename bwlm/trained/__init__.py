"""A trained model: loaded from its run, and exported with its card."""
