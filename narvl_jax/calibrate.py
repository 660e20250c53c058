r"""Calibrates the probabilities of a run to the accuracy of its answers.

python -m narvl_jax.calibrate --workdir=runs/shapes [--split=validation]
    [--checkpoint=best|last|STEP] [--max_examples=N] [--decoding=METHOD]

Evaluates the split, fits one temperature per task, and writes calibration.json
and calibration.png (reliability before and after) into the run folder.
`predict` and `evaluate` apply the temperatures to the same checkpoint and
decoding.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError, check_counts
from narvl_jax.files import side_files
from narvl_jax.files.paths import check_folder
from narvl_jax.files.stores import as_path
from narvl_jax.prediction import decoding_flags
from narvl_jax.prediction.calibration import Calibration
from narvl_jax.terminal.text import show

_PLOT = "calibration.png"


def calibrate(
  workdir: str | os.PathLike[str],
  *,
  split: str = "validation",
  checkpoint: str | int = "best",
  max_examples: int | None = None,
  batch_size: int | None = None,
  decoding: Mapping[str, Any] | None = None,
) -> Calibration:
  """Fits temperatures, prints a table and writes the files.

  Args:
    workdir: run folder.
    split: data on which to fit; not the one on which the run is judged.
    checkpoint: "best", "last" or a step.
    max_examples: at most this many of every data set; None for all.
    batch_size: `config.evaluation.batch_size` if None.
    decoding: see `decodings.decodings_for`.

  Raises:
    UserError: no such run, checkpoint or split, or no example has ground truth.
  """
  # Imported here, so that --help is fast.
  from narvl_jax.checkpointing.runs import load_run
  from narvl_jax.evaluation import calibrating, evaluator, results
  from narvl_jax.prediction.decodings import decoding_name, decodings_for

  check_counts(batch_size=batch_size, max_examples=max_examples)
  experiment, variables, step = load_run(workdir, checkpoint)
  check_folder("--workdir", workdir)
  name = decoding_name(decoding)
  _, predictions = evaluator.evaluate_tasks(
    experiment,
    variables,
    split=split,
    max_examples=max_examples,
    batch_size=batch_size,
    step=step,
    decodings=decodings_for(experiment, decoding),
    decoding_name=name,
  )
  measured = calibrating.by_task(predictions)
  if not measured:
    raise UserError(
      f'no record of split "{split}" has ground truth, so probabilities cannot'
      " be fitted to it; choose another --split"
    )
  tasks = {task: calibrating.fit(*of) for task, of in measured.items()}
  calibration = Calibration(step, name, split, tasks)
  path = calibration.write(workdir)
  plot = as_path(workdir) / _PLOT
  side_files.make_way(plot)
  picture = calibrating.draw(measured, calibration.temperatures)
  results.write_image(plot, picture, inside=as_path(workdir))
  show(f"{split}, step {step}, {name}\n")
  show(calibrating.format_tasks(tasks))
  show(f"\nwrote {path}\nwrote {plot}")
  return calibration


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir()
  common_flags.split("Split on which to fit.", "validation")
  common_flags.checkpoint()
  common_flags.max_examples(
    "At most this many of every data set; all by default."
  )
  common_flags.batch_size("Batch size; evaluation.batch_size by default.")
  decoding_flags.define_flags()
  common_flags.compilation_cache()
  flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  calibrate(
    settings.workdir,
    split=settings.split,
    checkpoint=settings.checkpoint,
    max_examples=settings.max_examples,
    batch_size=settings.batch_size,
    decoding=decoding_flags.from_flags(),
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
