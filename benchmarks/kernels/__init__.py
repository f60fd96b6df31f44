"""What the op benchmarks share: cases, bounds, tables."""
