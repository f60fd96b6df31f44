"""Models behind HTTP routes that existing clients speak."""
