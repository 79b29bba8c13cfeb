"""Tables that are read from the folders of runs."""
