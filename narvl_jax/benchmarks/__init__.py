"""Measurements: `python -m narvl_jax.benchmarks.NAME [--json=PATH]`."""
