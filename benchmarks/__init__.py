"""Measurements of speed, memory and exactness, each beside its limit: ``python -m benchmarks``."""
