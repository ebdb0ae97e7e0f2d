"""Benchmarks that users can run: python -m dbjax.bench NAME."""
