"""Statistics, tables, charts and reports; reads records, never torch."""
