"""The old name of the command `narvl_jax.convert_data`."""

from narvl_jax.data.renamed import run_renamed

if __name__ == "__main__":
  run_renamed("data.convert", "convert_data")
