"""Evaluation of a trained model: its loss in each direction, and the messages that it writes."""
