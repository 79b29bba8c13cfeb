"""Tables, charts and reports from the records of runs; never torch."""
