"""Ray: its environment, sessions, signals and capacity."""
