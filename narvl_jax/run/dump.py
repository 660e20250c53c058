"""Writes the programs of a run as text."""

from collections.abc import Callable, Iterator

import jax

from narvl_jax.ahead_of_time.compile import lower_predict_step
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.run_folder.metrics import format_bytes
from narvl_jax.training.setup import Setup


def dump_programs(
  setup: Setup,
  train_step: jax.stages.Compiled,
  to: str,
  say: Callable[[str], None],
) -> None:
  """Compiles the predict step; the first host writes it and the update.

  The predict step is that of `compile_check`: one batch of the first task,
  greedy. Each is written as `NAME.stablehlo.txt` and `NAME.optimised.txt`.

  Args:
    setup: the run.
    train_step: its compiled update.
    to: the folder.
    say: prints a line.

  Raises:
    OSError: the folder cannot be written.
  """
  folder = as_path(to)
  # On all hosts, because GPUs of several hosts compile together.
  texts = list(_texts(setup, train_step))
  if not distributed.is_first():
    return
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts:
    (folder / name).write_text(text, encoding="utf-8")
    say(f"wrote {folder / name}, {format_bytes(len(text))}")


def _texts(
  setup: Setup, train_step: jax.stages.Compiled
) -> Iterator[tuple[str, str]]:
  # Tracing once more is cheap beside the compilation.
  yield "train_step.stablehlo.txt", setup.trace_step().lower().as_text()
  yield "train_step.optimised.txt", train_step.as_text() or ""
  lowered = lower_predict_step(setup)
  yield "predict_step.stablehlo.txt", lowered.as_text()
  yield "predict_step.optimised.txt", lowered.compile().as_text() or ""
