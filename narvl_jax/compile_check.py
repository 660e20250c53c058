r"""Compiles a config for a TPU topology, on a machine without a TPU.

python -m narvl_jax.compile_check --config=configs/pod.py:base \
  --topology=v5e:16x16 [--num_slices=2] [--json=FILE] [--hlo=FILE]

Reports whether the train step fits into the memory of a chip, its operations
and communication, and its highest possible speed. Nothing is executed: times
are estimates. Requires `pip install "narvl_jax[aot]"`, but neither data nor a
vocabulary. Exit code 3: the step does not fit.
"""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections.config_flags import config_flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags

DOES_NOT_FIT_CODE = 3


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_string("topology", None, "CHIP:SHAPE, such as v5e:16x16.")
  flags.DEFINE_integer("num_slices", 1, "Slices of this topology.")
  common_flags.json()
  flags.DEFINE_string("hlo", None, "File to write the compiled program to.")
  flags.DEFINE_bool("predict", True, "Also compile the predict step.")
  flags.mark_flags_as_required(["config", "topology"])
  flags.declare_key_flag("config")  # Shown by --help.


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  # Imported here, so that --help is fast.
  import jax

  from narvl_jax.ahead_of_time import report

  # jax warns of a program that was compiled ahead of time: the cache stores it
  # but cannot load it.
  jax.config.update("jax_enable_compilation_cache", False)
  values = flags.FLAGS
  options = report.Options(
    topology=values.topology,
    num_slices=values.num_slices,
    json=values.json,
    hlo=values.hlo,
    predict=values.predict,
  )
  name = config_flags.get_config_filename(values["config"])
  if not report.check_config(options, values.config, name):
    sys.exit(DOES_NOT_FIT_CODE)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
