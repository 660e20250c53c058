"""The data of a run: opened and checked before anything is written."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from narvl_jax.config import Config
from narvl_jax.data.batching import short_reason
from narvl_jax.data.example import BAD_RECORD_ERRORS, Record
from narvl_jax.data.mixture import Entry, Mixture
from narvl_jax.data.pipeline import BadRecords, TrainBatches, train_batches
from narvl_jax.data.sources import load_source, locate
from narvl_jax.data.tasks import Encoded, Task, check_num_queries
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import load_dataset
from narvl_jax.parallel import local_rows
from narvl_jax.training.score import check_best_metric

if TYPE_CHECKING:
  from narvl_jax.experiment import Experiment
  from narvl_jax.training.setup import Setup

# Records of each source whose targets are held against the queries.
_CHECKED_RECORDS = 64

# A source, the name of its task, its share, and its name.
MixtureEntry = tuple[Sequence[Record], str, Any, str]


def load_mixture(config: Config) -> list[MixtureEntry]:
  """Opens the sources of `data.train`.

  Raises:
    UserError: a source, a split or an option does not exist.
  """
  return [
    (
      load_source(
        entry.source,
        task=entry.task,
        split=entry.get("split", "train"),
        **dict(entry.get("options", {})),
      ),
      entry.task,
      entry.get("weight", 1.0),
      name,
    )
    for name, entry in config.data.train.items()
  ]


def check_mixture(
  experiment: "Experiment", mixture: Sequence[MixtureEntry]
) -> Mixture:
  """Mixes the sources, before anything is written.

  Raises:
    UserError: the mixture makes no sense.
  """
  config = experiment.config
  return Mixture(
    [Entry(*entry) for entry in mixture],
    batch_size=config.train.batch_size,
    seed=config.seed,
    temperature=config.data.temperature,
  )


def check_evaluation(config: Config) -> None:
  """Opens what will be evaluated, which may be hours later.

  Raises:
    UserError: a source, a split or an option does not exist, or
      `evaluation.best_metric` will not be measured.
  """
  settings = {"evaluation.split": config.evaluation.split}
  if config.train.eval_every:
    settings["train.eval_split"] = config.train.eval_split
  for key, split in settings.items():
    for name in config.data.evaluation:
      try:
        load_dataset(config, name, split)
      except UserError as error:
        raise UserError(
          f'data.evaluation.{name} with {key}="{split}": {error}'
          f" (--config.{key})"
        ) from error
  tasks = [entry.task for entry in config.data.evaluation.values()]
  check_best_metric(config.evaluation.best_metric, tasks)


def check_targets(
  experiment: "Experiment", mixture: Sequence[MixtureEntry]
) -> list[str]:
  """Checks some targets of each source against queries and label length.

  Bad records are left out: training skips and counts them.

  Returns:
    A sentence for every source of which some targets do not fit.

  Raises:
    UserError: not even the shortest target of a task fits, or no record is
      good.
  """
  config = experiment.config
  limit = config.data.max_label_length
  # Every target can be written token by token.
  queries = None
  if not experiment.autoregressive:
    queries = experiment.model_config.num_queries
  notes = []
  for source, task, _, name in mixture:
    encoded = encode_first(source, experiment.tasks[task], name)
    if queries is not None:
      check_num_queries({task: encoded}, queries)
      needed = [required_queries(example.label_ids) for example in encoded]
      too_long = sum(number > queries for number in needed)
      if too_long:
        notes.append(
          f"{too_long} of {len(encoded)} targets of {name} need more than"
          f" {queries} queries and teach nothing:"
          f" --config.model.num_queries={max(needed)}"
        )
    over = min(len(x.label_ids) for x in encoded) - experiment.label_length
    if over > 0:
      raise UserError(
        f"data.max_label_length={limit} is shorter than every target of"
        f' "{name}", which has {limit + over} or more labels:'
        f" --config.data.max_label_length={limit + over}"
      )
  return notes


def encode_first(
  source: Sequence[Record], task: Task[Any], name: str
) -> list[Encoded]:
  """Encodes the first records that are good."""
  encoded, problem = [], ""
  count = min(len(source), _CHECKED_RECORDS)
  for i in range(count):
    try:
      encoded.append(task.encode(source[i]))
    except BAD_RECORD_ERRORS as error:
      problem = problem or f"{locate(source, i)}: {short_reason(error)}"
  if not encoded:
    raise UserError(
      f"none of the first {count} records of {name} is good:"
      f" {problem} (--config.data.train.{name})"
    )
  return encoded


def batch_opener(
  setup: "Setup", mixture: Sequence[MixtureEntry]
) -> Callable[[int], TrainBatches]:
  """Returns the function position -> this host's batches from there on.

  Args:
    setup: of the run.
    mixture: from `load_mixture`.
  """
  experiment = setup.experiment
  config = experiment.config
  return functools.partial(
    train_batches,
    mixture,
    experiment.tasks,
    batch_size=config.train.batch_size,
    seed=config.seed,
    rows=local_rows(setup.mesh, config.train.batch_size),
    image_size=tuple(config.data.image_size),
    max_text_length=config.data.max_text_length,
    max_label_length=experiment.label_length,
    temperature=config.data.temperature,
    num_workers=config.data.num_workers,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
    # Their count goes on where the batches are opened again.
    bad_records=BadRecords(config.data.max_bad_fraction),
  )
