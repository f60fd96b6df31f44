"""Other runtimes on the same weights, set up as their documentation says."""
