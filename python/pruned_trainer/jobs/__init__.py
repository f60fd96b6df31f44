"""The whole run of a command, from loading to the saved checkpoint."""
