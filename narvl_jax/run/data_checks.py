"""Checks the data of a run before anything is written."""

import math
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import Encoded, Task, check_num_queries
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.errors import UserError
from narvl_jax.evaluation.score import check_best_metric
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.datasets import DataSets, recipe_hint
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.training.constrained import CONSTRAINED_OFF, allowed_answers

# Records of each source whose targets are checked.
_CHECKED_RECORDS = 64


def make_mixture(
  config: Config,
  entries: Sequence[MixtureEntry],
  rows: Sequence[int] | None = None,
) -> Mixture:
  """Returns the mixture of a run.

  Args:
    rows: rows of every batch that belong to this host; None: all.

  Raises:
    UserError: weights or sources are invalid.
  """
  return Mixture(
    entries,
    batch_size=config.train.batch_size,
    seed=config.seed,
    rows=rows,
    temperature=config.data.temperature,
  )


def check_evaluation(datasets: DataSets) -> None:
  """Opens the data of the evaluations.

  Raises:
    UserError: a source, a split or an option does not exist, or
      `evaluation.best_metric` is not measured.
  """
  config = datasets.config
  settings = {"evaluation.split": config.evaluation.split}
  if config.train.eval_every:
    settings["train.eval_split"] = config.train.eval_split
  for key, split in settings.items():
    for name in config.data.evaluation:
      try:
        datasets.evaluation(name, split)
      except UserError as error:
        hint = recipe_hint(name, config.data.evaluation[name])
        raise UserError(
          f'data.evaluation.{name} with {key}="{split}": {error}'
          f" (--config.{key}{hint})"
        ) from error
  tasks = [entry.task for entry in config.data.evaluation.values()]
  check_best_metric(config.evaluation.best_metric, tasks)


def untrained_tasks(mixture: Mixture, position: int) -> list[str]:
  """Returns the tasks without an example before batch `position`."""
  counts: dict[str, int] = {}
  used = mixture.used(position)
  for entry, count in zip(mixture.entries, used, strict=True):
    counts[entry.task] = counts.get(entry.task, 0) + count
  return [task for task, count in counts.items() if not count]


def check_targets(
  experiment: Experiment, mixture: Sequence[MixtureEntry]
) -> list[str]:
  """Checks some targets of each source against queries and label length.

  Bad records are ignored here; training skips and counts them.

  A target with more than `data.max_label_length` labels is a bad record; one
  that needs more queries than there are contributes no gradient.

  Returns:
    A sentence for every source with targets that are too long.

  Raises:
    UserError: every target of a task is too long, more targets are than
      `data.max_bad_fraction` allows, or no record is good.
  """
  # Every target can be written token by token.
  queries = None
  if not experiment.autoregressive:
    queries = experiment.model_config.num_queries
  notes = []
  for source, task, _, name in mixture:
    encoded = encode_first(source, experiment.tasks[task], name)
    if queries is not None:
      check_num_queries({task: encoded}, queries)
    notes += _check_lengths(experiment, encoded, name)
    fits = [x for x in encoded if len(x.label_ids) <= experiment.label_length]
    needed = [required_queries(example.label_ids) for example in fits]
    too_long = sum(number > (queries or number) for number in needed)
    if too_long:
      notes.append(
        f"{too_long} of {len(encoded)} targets of {name} need more than"
        f" {queries} queries and contribute no gradient:"
        f" --config.model.num_queries={max(needed)}"
      )
  return notes


def _check_lengths(
  experiment: Experiment, encoded: Sequence[Encoded], name: str
) -> list[str]:
  """Returns a note about targets with too many labels, if there are any.

  Raises:
    UserError: they are all targets, or more than may be bad.
  """
  data = experiment.config.data
  over = [len(x.label_ids) - experiment.label_length for x in encoded]
  # In an autoregressive model eos is a label that the limit does not count.
  limit, longest = data.max_label_length, data.max_label_length + max(over)
  if min(over) > 0:
    raise UserError(
      f"data.max_label_length={limit} is shorter than every target of"
      f' "{name}", which has {limit + min(over)} or more labels:'
      f" --config.data.max_label_length={limit + min(over)}"
    )
  count = sum(number > 0 for number in over)
  if not count:
    return []
  text = (
    f"{count} of {len(encoded)} targets of {name} have more than"
    f" data.max_label_length={limit} labels and are bad records:"
    f" --config.data.max_label_length={longest}"
  )
  if not experiment.autoregressive:
    needed = max(required_queries(x.label_ids) for x in encoded)
    if needed > experiment.model_config.num_queries:
      text += f" --config.model.num_queries={needed}"
  # More than a few, which by chance are among the first.
  expected = data.max_bad_fraction * len(encoded)
  if count > expected + 3 * math.sqrt(expected):
    raise UserError(
      f"{text}; at most data.max_bad_fraction={data.max_bad_fraction:g} of the"
      " records may be bad"
    )
  return [text]


def check_answers(
  experiment: Experiment, mixture: Sequence[MixtureEntry]
) -> None:
  """Checks the first targets of each source against the answer list.

  Raises:
    UserError: one is not in the list.
  """
  if not experiment.config.loss.constrained:
    return
  eos = experiment.vocabulary.eos_id
  for source, name, _, entry in mixture:
    allowed = set(allowed_answers(experiment, name))
    if not allowed:
      continue
    for encoded in encode_first(source, experiment.tasks[name], entry):
      answer = tuple(token for token in encoded.label_ids if token != eos)
      if answer not in allowed:
        text = experiment.vocabulary.decode(answer).strip()
        raise UserError(
          f'the target "{text}" of data.train.{entry} is not among the'
          f" {len(allowed):,} answers of {name}, within which"
          " loss.constrained=True trains; add it to the list"
          f" (--config.tasks.{name}.answers), or {CONSTRAINED_OFF}"
        )


def encode_first(
  source: Sequence[Record], task: Task[Any], name: str
) -> list[Encoded]:
  """Encodes the good ones among the first records."""
  encoded, problem = [], ""
  reader = RecordReader(source, name)
  count = min(len(source), _CHECKED_RECORDS)
  for i in range(count):
    found = reader.read(i, task.encode)
    if isinstance(found, BadRecord):
      problem = problem or found.what
    else:
      encoded.append(found)
  if not encoded:
    raise UserError(
      f"none of the first {count} records of {name} is good:"
      f" {problem} (--config.data.train.{name})"
    )
  return encoded
