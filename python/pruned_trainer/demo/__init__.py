"""The demo: a small question set made here, and a run on it."""
