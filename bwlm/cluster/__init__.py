"""Ray: its environment, its sessions, its signals and what it has room for."""
