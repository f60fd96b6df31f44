"""What the model benchmarks share: cases, tables, memory."""
