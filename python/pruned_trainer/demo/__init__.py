"""The demo: a small set of questions, made here, and a run on it."""
