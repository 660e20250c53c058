"""Scores a trained run on every task of its config.

python -m narvl_jax.evaluate --workdir=runs/shapes [--split=test]
    [--checkpoint=best|last|STEP] [--max_examples=N] [--batch_size=B]
    [--decoding=greedy|beam|candidates|reference] [--constrained]
    [--answers=answers.txt] [--tasks=vqa,grounding] [--metrics=cheap|all]
    [--cider_df=FILE] [--annotations=FILE]

`--metrics=all` adds BLEU, METEOR, ROUGE-L, CIDEr and SPICE of captions. They
need pycocoevalcap and Java, which takes seconds to start; the default is
"cheap". `--cider_df` names the document frequencies of another corpus for
CIDEr. `--annotations` names the official annotations of the one evaluated data
set. docs/evaluation.md explains every metric.

Prints a table and writes evaluations/NAME.json, predictions/NAME.jsonl and
predictions/NAME.png into the run folder. NAME is SPLIT-STEP-DECODING, followed
by the limit (maxN) and the tasks if not all examples or tasks are evaluated,
and by "all" with --metrics=all.
With the run's own settings and its best checkpoint, evaluation.json is
replaced as well.
"""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import (
  UserError,
  check_counts,
  check_fractions,
  check_lists,
  did_you_mean,
)
from narvl_jax.evaluation import metric, reporting
from narvl_jax.files.paths import check_folder
from narvl_jax.metrics import tokenizers
from narvl_jax.metrics.cider import DocumentFrequencies
from narvl_jax.prediction import decoding_flags
from narvl_jax.prediction.calibration import read_temperatures
from narvl_jax.terminal.text import show, warn


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of an evaluation.

  Attributes:
    split: split of the data sets; `config.evaluation.split` if None.
    checkpoint: "best", "last" or a step.
    max_examples: at most this many of every data set, 0: all;
      `config.evaluation.max_examples` if None.
    batch_size: `config.evaluation.batch_size` if None.
    max_bad_fraction: largest fraction of bad records;
      `config.data.max_bad_fraction` if None.
    decoding: see `decodings.decodings_for`.
    answers: file of the answers that constrained VQA allows, see
      `narvl_jax.data.answers`; that of the config if "".
    tasks: tasks to evaluate; None: all.
    metrics: "cheap", or "all", which includes those that need Java.
    cider_df: file of document frequencies for CIDEr; those of the evaluated
      references if "".
    annotations: file of the official annotations of the one data set of
      `tasks`, see `narvl_jax.data.sources.annotations`; those of the config if
      "".
  """

  split: str | None = None
  checkpoint: str | int = "best"
  max_examples: int | None = None
  batch_size: int | None = None
  max_bad_fraction: float | None = None
  decoding: Mapping[str, Any] | None = None
  answers: str = ""
  tasks: Sequence[str] | None = None
  metrics: str = "cheap"
  cider_df: str = ""
  annotations: str = ""

  def __post_init__(self) -> None:
    check_lists(tasks=self.tasks)
    check_counts(batch_size=self.batch_size)
    check_counts(least=0, max_examples=self.max_examples)
    check_fractions(max_bad_fraction=self.max_bad_fraction)


def evaluate(
  workdir: str | os.PathLike[str], options: Options = Options()
) -> reporting.Report:
  """Evaluates a checkpoint, prints the table and writes the results.

  Returns:
    The report, see `evaluator.evaluate_tasks`.

  Raises:
    UserError: no such run, checkpoint or split, or a number out of range; or
      `answers` without effect.
  """
  # Imported here, so that --help is fast.
  from narvl_jax.checkpointing.runs import load_run
  from narvl_jax.evaluation import evaluator, results
  from narvl_jax.prediction import decodings as decodings_lib
  from narvl_jax.prediction.answer_list import with_answers

  metric_options = _metric_options(options.metrics, options.cider_df)
  experiment, variables, step = load_run(workdir, options.checkpoint)
  settings: Any = experiment.config.evaluation
  if options.max_bad_fraction is not None:
    experiment.config.data.max_bad_fraction = options.max_bad_fraction
  if options.annotations:
    _set_annotations(experiment.config, options.tasks, options.annotations)
  if options.answers:
    experiment = with_answers(experiment, options.answers)
  max_examples = options.max_examples
  if max_examples is None:
    max_examples = settings.max_examples
  decodings = decodings_lib.decodings_for(experiment, options.decoding)
  tasks = options.tasks or decodings
  decodings_lib.check_answers_used(
    {k: v for k, v in decodings.items() if k in tasks}, options.answers
  )
  check_folder("--workdir", workdir)
  name = decodings_lib.decoding_name(options.decoding, options.answers)
  temperatures, note = read_temperatures(workdir, step, name)
  if note:
    warn(note)
  start = time.monotonic()
  report, predictions = evaluator.evaluate_tasks(
    experiment,
    variables,
    split=settings.split if options.split is None else options.split,
    max_examples=max_examples or None,
    batch_size=options.batch_size,
    step=step,
    decodings=decodings,
    decoding_name=name,
    temperatures=temperatures,
    tasks=options.tasks,
    options=metric_options,
  )
  report |= {
    "metrics": options.metrics,
    "cider_df": options.cider_df,
    "annotations": options.annotations,
  }
  seconds = time.monotonic() - start
  # First: stdout may be closed or full, and what was computed must be kept.
  paths = results.write_results(
    experiment,
    workdir,
    report,
    predictions,
    best=options.checkpoint == "best",
  )
  show(reporting.format_table(report))
  show(f"\n{report['examples'] / seconds:.3g} examples/s, {seconds:.1f} s")
  for path in paths:
    show(f"wrote {path}")
  return report


def _metric_options(metrics: str, cider_df: str) -> metric.Options:
  if metrics not in metric.METRIC_SETS:
    hint = did_you_mean(metrics, metric.METRIC_SETS)
    raise UserError(f'--metrics="{metrics}" is unknown.{hint}')
  options = metric.Options(metrics, intervals=True)
  if not cider_df:
    return options
  frequencies = DocumentFrequencies.load(cider_df)
  if frequencies.tokenizer == "ptb":
    why = tokenizers.why_no_ptb() if metrics == "all" else "add --metrics=all"
    if why:
      raise UserError(
        f'--cider_df="{cider_df}" counts words of the tokenizer ptb, which only'
        f" the figure cider of --metrics=all uses; {why}, or count words of the"
        " tokenizer simple"
      )
  return dataclasses.replace(options, frequencies=frequencies)


def _set_annotations(
  config: Any, tasks: Sequence[str] | None, annotations: str
) -> None:
  entries = config.data.evaluation
  chosen = [k for k, x in entries.items() if not tasks or x.task in tasks]
  if len(chosen) != 1:
    raise UserError(
      f'--annotations="{annotations}" is for one data set, but'
      f" {' and '.join(chosen) or 'none'} would be evaluated; choose its task"
      " by --tasks, or train with --config.data.evaluation.NAME.annotations"
    )
  entries[chosen[0]].annotations = annotations


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir()
  flags.DEFINE_list("tasks", None, "Tasks; all by default.")
  common_flags.split("Split; evaluation.split by default.", None)
  common_flags.checkpoint()
  common_flags.max_examples(
    "At most this many of every data set, 0: all; evaluation.max_examples by"
    " default."
  )
  common_flags.batch_size("Batch size; evaluation.batch_size by default.")
  common_flags.max_bad_fraction("; data.max_bad_fraction by default")
  common_flags.answers()
  flags.DEFINE_enum(
    "metrics",
    "cheap",
    metric.METRIC_SETS,
    "Whether to compute the figures of captions that start Java, too.",
  )
  flags.DEFINE_string(
    "cider_df",
    "",
    "File of document frequencies for CIDEr; those of the evaluated references"
    " by default.",
  )
  flags.DEFINE_string(
    "annotations",
    "",
    "File of the official annotations of the evaluated data set; those of the"
    " config by default.",
  )
  decoding_flags.define_flags()
  common_flags.json()
  common_flags.compilation_cache()
  flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  check_json_path(settings.json)
  options = Options(
    split=settings.split,
    checkpoint=settings.checkpoint,
    max_examples=settings.max_examples,
    batch_size=settings.batch_size,
    max_bad_fraction=settings.max_bad_fraction,
    decoding=decoding_flags.from_flags(),
    answers=settings.answers,
    tasks=settings.tasks,
    metrics=settings.metrics,
    cider_df=settings.cider_df,
    annotations=settings.annotations,
  )
  write_report(settings.json, evaluate(settings.workdir, options))


if __name__ == "__main__":
  define_flags()
  cli.run(main)
