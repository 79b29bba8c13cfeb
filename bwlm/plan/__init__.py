"""From a grid file to cells, before Ray or torch is imported."""
