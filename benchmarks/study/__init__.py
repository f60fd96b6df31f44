"""The paper's study: rows, timings, page."""
