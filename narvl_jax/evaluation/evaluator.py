"""Evaluates a model on the data sets of its tasks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from narvl_jax.data.batches.bad_records import BadRecords
from narvl_jax.data.sources.annotations import AnnotatedSource
from narvl_jax.data.sources.subset import Subset, spread
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation.metric import CHEAP, Options
from narvl_jax.evaluation.reporting import Prediction, Report
from narvl_jax.evaluation.tally import Tally
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.prediction.predictor import Predictor
from narvl_jax.terminal import progress
from narvl_jax.terminal.activity import Activity


def evaluate_tasks(
  experiment: Experiment,
  variables: Any,
  *,
  split: str,
  max_examples: int | None = None,
  batch_size: int | None = None,
  step: int | None = None,
  decodings: Mapping[str, Decoding] | None = None,
  decoding_name: str = "greedy",
  temperatures: Mapping[str, float] | None = None,
  tasks: Sequence[str] | None = None,
  before_batch: Callable[[], None] = lambda: None,
  options: Options = CHEAP,
) -> tuple[Report, list[Prediction]]:
  """Predicts every example of `config.data.evaluation` and scores it.

  All tasks share one compiled predict step, and so do later calls with the
  same model and batch size. Several hosts share the examples and exchange what
  they measured at the end; all return the same.

  Args:
    experiment: model, vocabulary, tasks and config of the run.
    variables: variables of the model; the batch is split over their mesh, if
      any.
    split: such as "validation" or "test".
    max_examples: at most this many of every data set, spread evenly over it.
    batch_size: `config.evaluation.batch_size` by default; rounded up to a
      multiple of the devices that share a batch.
    step: training step of `variables`, for the report.
    decodings: decodings by task; the default is greedy.
    decoding_name: name of `decodings` in the report.
    temperatures: temperatures by task, see `prediction.calibration`.
    tasks: evaluated tasks; all if None.
    before_batch: called before each batch, equally often on all hosts; an
      exception that it raises ends the evaluation.
    options: which figures are computed; `config.evaluation.vqa_rule` replaces
      the rule.

  Returns:
    The report and one prediction per example (see `tally.describe`). The
    report has split, step, `decoding_name`, `decoding` (task -> settings),
    `max_examples`, `only_tasks` (None if all were evaluated), examples,
    `tasks` (task -> metric -> value in [0, 1], CIDEr to 10), `counts` (task ->
    examples), `kinds`, `question_types` and `sizes` (task -> group -> metrics
    and examples) and `datasets` (name -> task, metrics, examples, `records`
    and, if the config names it, `partition`). With ground truth for them it has
    `confusion`, `pope` and `unavailable`, with `options.intervals` also
    `intervals` (task -> metric -> [low, high]), which the other entries have
    for themselves. Records without ground truth count as examples and have no
    score; bad records are no examples and have a score of 0 in means.

  Raises:
    UserError: a data set, the split or a task is unknown, a decoding does not
      fit its task, too many records are bad, or one has no annotation.
  """
  entries = _entries(experiment, tasks)
  predictor = Predictor(experiment, variables, decodings, temperatures)
  for entry in entries.values():
    # Rejects a decoding that does not fit before anything is computed.
    predictor.steps(entry.task)
  config: Any = experiment.config
  opened = {name: experiment.dataset(name, split) for name in entries}
  subsets = {
    name: Subset(source, spread(len(source), max_examples))
    for name, source in opened.items()
  }
  for name, source in opened.items():
    if isinstance(source, AnnotatedSource):
      source.check(subsets[name].indices)
  total = sum(map(len, subsets.values()))
  size = batch_size or config.evaluation.batch_size
  options = dataclasses.replace(options, vqa_rule=config.evaluation.vqa_rule)
  with progress.doing(f"evaluating {split}", total, "examples") as activity:
    tally = _predict(
      predictor, config.data, subsets, activity, size, before_batch, options
    ).of_all_hosts()
  tally.check(total)
  every = _tasks_of(config.data.evaluation)
  evaluated = _tasks_of(entries)
  report = tally.report(split=split, step=step)
  for name, entry in report["datasets"].items():
    if partition := entries[name].get("partition", ""):
      entry["partition"] = partition
  report |= {
    "decoding_name": decoding_name,
    "decoding": {
      task: dataclasses.asdict((decodings or {}).get(task, Decoding()))
      for task in report["tasks"]
    },
    "max_examples": max_examples,
    "only_tasks": None if evaluated == every else evaluated,
  }
  return report, list(tally.predictions.values())


def _predict(
  predictor: Predictor,
  data: Any,
  subsets: Mapping[str, Subset],
  activity: Activity,
  batch_size: int,
  before_batch: Callable[[], None],
  options: Options,
) -> Tally:
  """Predicts the examples of this host; `data` is `config.data`."""
  tally, first = Tally(options), 0
  for name, subset in subsets.items():
    task = data.evaluation[name].task
    bad_records = BadRecords(data.max_bad_fraction)
    for answer in predictor.answers(
      subset,
      task,
      batch_size=batch_size,
      before_batch=before_batch,
      bad_records=bad_records,
    ):
      index = subset.indices[answer.index]
      tally.update(answer, first + answer.index, dataset=name, index=index)
      # Other hosts predict the examples in between.
      activity.done = first + answer.index + 1
    for i in bad_records.indices_of(task):
      tally.bad[first + i] = task, name
    first += len(subset)
    activity.done = first
  return tally


def _entries(
  experiment: Experiment, tasks: Sequence[str] | None
) -> dict[str, Any]:
  """Returns the entries of `config.data.evaluation` of some tasks."""
  for name in tasks or ():
    if name not in experiment.tasks:
      known = list(experiment.tasks)
      raise UserError(
        f'--tasks: the run has no task "{name}".{did_you_mean(name, known)}'
      )
  return {
    name: entry
    for name, entry in experiment.config.data.evaluation.items()
    if not tasks or entry.task in tasks
  }


def _tasks_of(entries: Mapping[str, Any]) -> list[str]:
  return list(dict.fromkeys(entry.task for entry in entries.values()))
