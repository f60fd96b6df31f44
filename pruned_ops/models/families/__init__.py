"""One description for each family of encoders: what its publisher calls the parts, and how they differ."""
