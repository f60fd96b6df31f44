"""Other runtimes, set up as their documents say."""
