"""RESEARCH_REPORT.md of a grid."""
