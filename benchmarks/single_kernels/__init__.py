"""What bench_ops.py is made of: cases, bounds and tables of single ops."""
