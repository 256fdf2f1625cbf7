"""Benchmarks. `python -m benchmarks.run` measures everything and rewrites the README's table."""
