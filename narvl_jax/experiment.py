"""An experiment: config, vocabulary, tasks and model that belong together."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import meta

from narvl_jax.config import Config
from narvl_jax.config_checks import validate
from narvl_jax.data.batching import short_reason
from narvl_jax.data.example import BAD_RECORD_ERRORS, TASKS, Record
from narvl_jax.data.mixture import Entry, Mixture
from narvl_jax.data.sources import load_source, locate
from narvl_jax.data.tasks import (
  Encoded,
  Task,
  check_num_queries,
  make_task,
  vocabulary_texts,
)
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.data.vocabulary import OFFICIAL_FIXED_IDS, Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import load_dataset
from narvl_jax.models import (
  EncoderDecoder,
  ModelConfig,
  make_model,
  model_config,
)
from narvl_jax.models.autoregressive import check_decoder_length
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.checkpoints import Checkpoints, choose_step
from narvl_jax.training.optimizer import assign_rules, flatten, split_frozen
from narvl_jax.training.score import check_best_metric
from narvl_jax.training.train_state import abstract_variables

VOCABULARY_FOLDER = "vocabulary"
# Records of each source that a trained vocabulary has seen.
_VOCABULARY_RECORDS = 4000
# Records of each source whose targets are held against the queries.
_CHECKED_RECORDS = 64

# A source, the name of its task, its share, and its name.
MixtureEntry = tuple[Sequence[Record], str, Any, str]


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What training, evaluation and prediction share.

  Attributes:
    config: every setting.
    vocabulary: text to ids and back.
    tasks: name -> task.
    model_config: the resolved architecture.
    model: the network.
  """

  config: Config
  vocabulary: Vocabulary
  tasks: dict[str, Task[Any]]
  model_config: ModelConfig
  model: EncoderDecoder

  @property
  def autoregressive(self) -> bool:
    """Whether the model answers token by token."""
    return is_autoregressive(self.config)

  @property
  def label_length(self) -> int:
    """Labels of a target at most, those of an autoregressive one with eos."""
    return label_length(self.config)

  @property
  def prompted(self) -> tuple[bool, ...]:
    """By the order of `TASKS`: a decoder reads the source before it answers."""
    tasks = self.config.tasks
    return tuple(
      self.autoregressive and name in tasks and tasks[name].decoder_prompt
      for name in TASKS
    )

  @property
  def answer_positions(self) -> tuple[int, int] | None:
    """Positions that an autoregressive decoder reads, and that it predicts."""
    if not self.autoregressive:
      return None
    prompt = self.config.data.max_text_length - 1 if any(self.prompted) else 1
    return prompt + self.label_length - 1, self.label_length

  def save(self, workdir: str | os.PathLike[str]) -> None:
    """Writes vocabulary and config, from which `restore` builds it again."""
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    self.vocabulary.save(folder / VOCABULARY_FOLDER)
    # Last: a folder with a config is a run.
    workdir_lib.write_config(folder, self.config)

  def abstract_variables(self) -> Any:
    """Returns the shapes of the variables, boxed with logical axis names."""
    data = self.config.data
    return abstract_variables(
      self.model, tuple(data.image_size), data.max_text_length
    )


def build(
  config: Config,
  workdir: str | os.PathLike[str] | None = None,
  *,
  shapes_only: bool = False,
) -> Experiment:
  """Builds an experiment; writes nothing (see `Experiment.save`).

  Args:
    config: checked here.
    workdir: if it has a vocabulary that one is used, so that a resumed run
      does not depend on what it was made from.
    shapes_only: without tasks, and with a vocabulary of the right size that is
      neither read nor trained (a trained one may come out smaller).

  Raises:
    UserError: the config, or something that it names, is wrong.
  """
  validate(config)
  if shapes_only:
    vocabulary = _placeholder_vocabulary(config)
  elif workdir is not None and workdir_lib.is_run(pathlib.Path(workdir)):
    vocabulary = Vocabulary.load(pathlib.Path(workdir) / VOCABULARY_FOLDER)
  else:
    vocabulary = make_vocabulary(config)
  # An autoregressive model must learn where to stop.
  always = {"eos": True} if is_autoregressive(config) else {}
  tasks = {
    name: make_task(name, vocabulary, dict(settings) | always)
    for name, settings in config.tasks.items()
    if not shapes_only
  }
  architecture = resolve_model_config(config, vocabulary)
  experiment = Experiment(
    config=config,
    vocabulary=vocabulary,
    tasks=tasks,
    model_config=architecture,
    model=make_model(architecture),
  )
  if experiment.answer_positions is not None:
    check_decoder_length(architecture, experiment.answer_positions[0])
  return experiment


def restore(
  workdir: str | os.PathLike[str],
  checkpoint: str | int = "best",
  *,
  sharding: jax.sharding.Sharding | None = None,
) -> tuple[Experiment, dict[str, Any], int]:
  """Reads a trained experiment.

  Args:
    workdir: folder of the run.
    checkpoint: "best" (by the evaluations during training), "last", or a
      step.
    sharding: where each variable shall lie; None: on the first device.

  Returns:
    The experiment, its variables (moving averages if the run has them), and
    the step of the checkpoint.

  Raises:
    UserError: there is no run or no such checkpoint.
  """
  folder = pathlib.Path(workdir)
  config = workdir_lib.read_config(folder)
  experiment = build(config, folder)
  shapes = meta.unbox(experiment.abstract_variables())
  shapes = {"batch_stats": {}, **shapes}
  ema = None
  if config.optimizer.ema_decay:
    paths = list(flatten(shapes["params"]))
    rules = assign_rules(config.optimizer.rules, paths)
    trained, _ = split_frozen(shapes["params"], rules)
    ema = {"params": trained, "batch_stats": shapes["batch_stats"]}
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def placed(tree: Any) -> Any:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      tree,
    )

  with Checkpoints(folder) as checkpoints:
    step = choose_step(checkpoints, checkpoint)
    variables = checkpoints.restore_variables(
      step, placed(shapes), None if ema is None else placed(ema)
    )
  return experiment, variables, step


def is_autoregressive(config: Config) -> bool:
  """Returns whether the model of a config answers token by token."""
  return config.model.decoder == "autoregressive"


def label_length(config: Config) -> int:
  """Returns the labels that a target may have.

  `data.max_label_length`, and one more for an autoregressive model if that
  leaves eos out.
  """
  without_eos = any(not task.eos for task in config.tasks.values())
  extra = is_autoregressive(config) and without_eos
  return config.data.max_label_length + int(extra)


def resolve_model_config(config: Config, vocabulary: Vocabulary) -> ModelConfig:
  """Returns the architecture: the named size and what the config overrides.

  Raises:
    UserError: settings that do not fit together.
  """
  overrides = {
    name: value
    for name, value in config.model.items()
    if name not in ("size", "dtype") and value is not None
  }
  return model_config(
    config.model.size,
    # Blank is the last id.
    vocab_size=vocabulary.size - int(is_autoregressive(config)),
    pad_id=vocabulary.pad_id,
    dtype=compute_dtype(config.model.dtype),
    **overrides,
  )


def compute_dtype(name: str) -> Any:
  """Returns the type of activations; "auto" is bfloat16 but on a CPU."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


def make_vocabulary(config: Config) -> Vocabulary:
  """Reads or trains the vocabulary that a config asks for.

  Raises:
    UserError: its files are missing, or its size is too small.
  """
  settings = config.vocabulary
  counts = {"num_codes": settings.num_codes, "num_bins": settings.num_bins}
  if settings.source == "train":
    return Vocabulary.train(_texts(config), settings.size, **counts)
  folder = pathlib.Path(settings.path)
  if settings.source == "run":
    words = folder / VOCABULARY_FOLDER
    if not words.is_dir():
      raise UserError(
        f'vocabulary.path="{folder}" has no {words.name}; with'
        " vocabulary.source=run it must be the folder of a run"
        " (--config.vocabulary.path)"
      )
    return Vocabulary.load(words)
  if settings.source == "official":
    return Vocabulary.from_official(
      folder / "dict.txt",
      folder / "encoder.json",
      folder / "vocab.bpe",
      **counts,
    )
  return Vocabulary.from_huggingface(
    folder / "vocab.json", folder / "merges.txt", **counts
  )


def _placeholder_vocabulary(config: Config) -> Vocabulary:
  settings = config.vocabulary
  counts = {"num_codes": settings.num_codes, "num_bins": settings.num_bins}
  if settings.source in ("huggingface", "run"):
    # Only its files tell the size.
    return make_vocabulary(config)
  size = settings.size
  if settings.source == "official":
    size = OFFICIAL_FIXED_IDS + sum(counts.values())
  return Vocabulary.placeholder(size, **counts)


def _texts(config: Config) -> Iterator[str]:
  for source, task, _, name in load_mixture(config):
    count = min(len(source), _VOCABULARY_RECORDS)
    # Spread over the source, which may be sorted.
    records = _Strided(source, len(source) // count, count)
    texts = vocabulary_texts(task, dict(config.tasks[task]), records)
    first = next(texts, None)
    if first is None:
      _raise_first_fault(records, name)
    else:
      yield first
      yield from texts


def _raise_first_fault(source: Sequence[Record], name: str) -> None:
  """Raises `UserError` for a source without a good record."""
  try:
    problem = f"record {source[0].id} has no text"
  except BAD_RECORD_ERRORS as error:
    problem = f"{locate(source, 0)}: {short_reason(error)}"
  raise UserError(
    f"no record of {name} that was read for the vocabulary is good: {problem}"
    " (python -m narvl_jax.data.check tells more)"
  )


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
  experiment: Experiment, mixture: Sequence[MixtureEntry]
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
  experiment: Experiment, mixture: Sequence[MixtureEntry]
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


class _Strided(Sequence[Record]):
  """Every n-th record of a source."""

  def __init__(self, source: Sequence[Record], stride: int, count: int) -> None:
    self._source, self._stride, self._count = source, stride, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: Any) -> Any:
    return self._source[index * self._stride]

  def locate(self, index: int) -> str:
    """Returns where a record comes from."""
    return locate(self._source, index * self._stride)
