"""Training: a loop, and the phases that feed it."""
