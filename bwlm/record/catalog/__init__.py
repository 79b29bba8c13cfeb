"""What a storage holds: rows of runs, filters, descriptions, and the choice of runs."""
