"""What stays of a model: gates, budgets, decisions, compaction."""
