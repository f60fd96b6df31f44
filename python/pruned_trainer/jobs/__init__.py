"""A command's whole run, in order."""
