"""What bench_serve.py is made of: clients that ask a server over loopback."""
