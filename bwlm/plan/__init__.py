"""Plans: grid files and flags become cells, before Ray or torch is imported."""
