"""The microbenchmark: `python -m bench --help`."""
