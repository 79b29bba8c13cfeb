"""Talking to a model: in a terminal, in a browser, and through protocols that other programs know."""
