"""The loss of a trained model in each direction, and the messages that it writes."""
