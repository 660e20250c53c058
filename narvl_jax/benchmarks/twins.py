r"""Trains models that differ only in their decoder, and compares them.

    python -m narvl_jax.benchmarks.twins --runs=runs/twins \
      [--data=shapes,easy_vqa] [--seeds=0,1] [--kinds=nar,ar,distilled]
    python -m narvl_jax.benchmarks.twins --table

The kinds of runs, for each data set and seed:

nar: the parallel model.
ar: its autoregressive twin with the same config, seed, steps and batches.
distilled: the parallel model; half of its captions are the twin's predictions
  for the first --max_examples scenes of the training split.

The last checkpoint of each run is decoded in several ways: nar and distilled
greedily, greedily with constraints, and by constrained beam search; ar greedily
and as the official code does. The decoding of each task is chosen on the
validation split, whose pictures easy_vqa trains on.

The command can be killed at any time and started again. Finished runs are not
trained again; each adds one line to --results. RUNS/DATA_KIND_SEED may also
come from `python -m narvl_jax.train` with the config of the data set
(`twins_runs.STUDIES`), --config.seed and --config.model.decoder. --notrain
evaluates only finished runs.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.benchmarks.twins_runs import STUDIES, Study, Twins
from narvl_jax.benchmarks.twins_table import (
  append_row,
  format_table,
  read_rows,
)
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.reliability.explain import explain_failure
from narvl_jax.reliability.interrupt import termination_raises

RESULTS = pathlib.Path(__file__).parent / "results" / "twins.jsonl"
# In the order in which they are trained.
_KINDS = ("nar", "ar", "distilled")


def run(
  runs: pathlib.Path,
  results: pathlib.Path,
  *,
  studies: Mapping[str, Study],
  seeds: Sequence[int],
  kinds: Sequence[str],
  labels: int = 20_000,
  trains: bool = True,
) -> None:
  """Trains and evaluates the runs without a line in the results.

  Args:
    runs: folder of the run folders.
    results: file with a line for each run.
    studies: name -> data set.
    seeds: of the runs.
    kinds: some of "nar", "ar" and "distilled", which trains its teacher, too.
    labels: captions that a teacher predicts.
    trains: whether unfinished runs are trained.

  Raises:
    UserError: a folder contains something else, or a file cannot be read.
  """
  for name, study in studies.items():
    twins = Twins(name, study, runs, labels, trains)
    for seed in seeds:
      for kind in kinds:
        if (name, kind, seed) in read_rows(results):
          continue
        # Students are trained on captions.
        if kind == "distilled" and not study.captions:
          continue
        print(f"\n{name}, {kind}, seed {seed}", flush=True)
        if twins.prepare(kind, seed):
          append_row(results, twins.measure(kind, seed))
          print(f"added to {results}", flush=True)


def table(results: pathlib.Path) -> str:
  """Returns the table of a results file; see `twins_table.format_table`."""
  return format_table(
    read_rows(results),
    {name: study.tasks for name, study in STUDIES.items()},
    {name: study.splits for name, study in STUDIES.items()},
  )


def _chosen(flag: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
  for name in names:
    if name not in known:
      raise UserError(f'--{flag}: no "{name}".{did_you_mean(name, known)}')
  if not names:
    raise UserError(f"--{flag} is empty; choose from {', '.join(known)}")
  # In their order.
  return [name for name in known if name in names]


def _seeds(texts: Sequence[str]) -> list[int]:
  for text in texts:
    if not text.isdecimal():
      raise UserError(f'--seeds: "{text}" is not a seed; such as --seeds=0,1')
  if not texts:
    raise UserError("--seeds is empty; such as --seeds=0,1")
  return sorted({int(text) for text in texts})


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("runs", "", "Folder of the run folders.")
  flags.DEFINE_list("data", list(STUDIES), "Data sets.")
  flags.DEFINE_list("seeds", ["0", "1"], "Seeds of the runs.")
  flags.DEFINE_list("kinds", list(_KINDS), "What to train.")
  common_flags.max_examples(
    "Captions that a twin predicts.", 20_000, old="labels", lower_bound=1
  )
  flags.DEFINE_bool("train", True, "Train what is not finished.")
  flags.DEFINE_string("results", str(RESULTS), "File with a line a run.")
  flags.DEFINE_bool("table", False, "Only print the table of the results.")


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line says what to do."""
  del argv
  settings = flags.FLAGS
  results = pathlib.Path(settings.results)
  if results.is_dir():
    raise UserError(f'--results="{results}" is a folder; give a file')
  if not settings.table:
    if not settings.runs:
      raise UserError(
        "--runs is missing: the folder of the run folders, such as"
        " --runs=runs/twins; or --table to print what there is"
      )
    names = _chosen("data", settings.data, list(STUDIES))
    _train_and_measure(
      pathlib.Path(settings.runs),
      results,
      studies={name: STUDIES[name] for name in names},
      seeds=_seeds(settings.seeds),
      kinds=_chosen("kinds", settings.kinds, _KINDS),
      labels=settings.max_examples,
      trains=settings.train,
    )
  print(table(results))


def _train_and_measure(runs: pathlib.Path, *args: Any, **kwargs: Any) -> None:
  try:
    with termination_raises():
      run(runs, *args, **kwargs)
  except UserError:
    raise
  except (KeyboardInterrupt, Exception) as error:
    code, message = explain_failure(error, runs)
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
