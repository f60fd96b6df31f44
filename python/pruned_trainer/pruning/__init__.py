"""What stays: gates, budgets, decisions, compaction."""
