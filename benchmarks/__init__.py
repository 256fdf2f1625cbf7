"""Benchmarks: `benchmarks.run` measures everything, `benchmarks.summary` sums up in the README."""
