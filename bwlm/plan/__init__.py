"""Grid files become cells here, before Ray or torch is imported."""
