"""transformers.Trainer, and what pruning adds to it."""
