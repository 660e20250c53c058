"""Checks of data sets, for `narvl_jax.check_data`."""
