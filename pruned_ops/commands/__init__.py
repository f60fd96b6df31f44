"""The commands of `pruned-ops`, one file each."""
