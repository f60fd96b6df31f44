"""What `pruned-ops` can do, a file a command."""
