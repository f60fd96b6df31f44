"""What the benchmarks of whole models share: cases, timing on a GPU, memory, reports."""
