"""Experiments with models: what the methods find, not how fast."""
