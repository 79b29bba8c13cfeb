"""Research reports: RESEARCH_REPORT.md of a grid or of one run."""
