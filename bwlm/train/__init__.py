"""One training loop and the phases that feed it."""
