"""Tasks: their data, read and checked, and their official metrics."""
