"""The default experiment, and the check of a config against it."""

import dataclasses
import math
import numbers
from typing import Any, TypeAlias

from ml_collections import ConfigDict, config_dict

from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import default_settings
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.models import ModelConfig
from narvl_jax.parallel.rules import DEFAULT_RULES
from narvl_jax.query_ctc.loss import CONFIDENCE_MODES

OPTIMIZERS = ("adamw", "muon")
# A ConfigDict, whose keys no type checker knows.
Config: TypeAlias = Any

VOCABULARY_SOURCES = ("train", "official", "huggingface")
DTYPES = ("auto", "float32", "bfloat16")

# Fields of ModelConfig that follow from the vocabulary.
_FROM_VOCABULARY = ("vocab_size", "pad_id")

_EVALUATION_KEYS = ("source", "task", "options")
_TRAIN_KEYS = (*_EVALUATION_KEYS, "weight", "split")


def default_config(*tasks: str) -> Config:
  """Returns every setting with its default.

  A leaf under `model` that is None keeps the value of the named size. A config
  file fills `data.train` and `data.evaluation` with `train_source` and
  `evaluation_source`.

  Args:
    *tasks: names of the tasks of the run.
  """
  config: Config = ConfigDict()
  config.seed = 0
  config.model = _model_defaults()
  config.vocabulary = ConfigDict(
    {
      "source": "train",
      "size": 1000,
      "path": "",
      "num_bins": 1000,
      "num_codes": 0,
    }
  )
  config.tasks = ConfigDict({name: default_settings(name) for name in tasks})
  config.data = ConfigDict(
    {
      "image_size": (480, 480),
      "max_text_length": 80,
      "max_label_length": 20,
      "num_threads": 2,
      "prefetch": 4,
      "max_bad_fraction": 0.01,
      # NAME: train_source(...)
      "train": {},
      # NAME: evaluation_source(...)
      "evaluation": {},
    }
  )
  config.loss = ConfigDict(
    {
      "label_smoothing": 0.0,
      "confidence": "weight",
      # Classes whose logits exist at a time; 0: all. A larger vocabulary is
      # computed twice, in chunks; see README.
      "chunk_size": 4096,
    }
  )
  config.optimizer = ConfigDict(
    {
      "name": "adamw",
      "learning_rate": 1e-3,
      "schedule": "cosine",
      "warmup_steps": 0,
      "weight_decay": 0.01,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "clip_norm": 1.0,
      # 0 keeps no moving averages.
      "ema_decay": 0.0,
      "ema_warmup": True,
      # (regex, {lr, decay, freeze}); the first match of a full path counts.
      "rules": ((".*", {}),),
    }
  )
  config.train = ConfigDict(
    {
      "steps": 1000,
      "batch_size": 128,
      "accumulation_steps": 1,
      "log_every": 50,
      # 0: only at the end.
      "eval_every": 0,
      "eval_split": "validation",
      # At most this many of every source.
      "eval_examples": 256,
      # 0: only at the end.
      "checkpoint_every": 500,
      "keep_last": 2,
    }
  )
  config.evaluation = ConfigDict(
    {
      "split": "test",
      "batch_size": 128,
      # At most this many of every source; 0: all.
      "max_examples": 0,
      "mask_specials": True,
      # Decides which checkpoint is best: "mean" of the tasks' main scores, or
      # TASK/METRIC.
      "best_metric": "mean",
    }
  )
  config.mesh = ConfigDict(
    {
      # Sizes of the axes; -1 takes what the others leave.
      "data": -1,
      "fsdp": 1,
      "tensor": 1,
      # -1: what the devices say.
      "slices": -1,
      # See narvl_jax/parallel/rules.py.
      "rules": DEFAULT_RULES,
    }
  )
  return config


def train_source(
  source: str,
  task: str,
  *,
  weight: float | tuple[tuple[int, float], ...] = 1.0,
  split: str = "train",
  **options: Any,
) -> Config:
  """Returns an entry of `data.train`.

  Args:
    source: name of the source, such as "shapes".
    task: name of the task, one of `config.tasks`.
    weight: share of the examples, relative to the other entries; or
      ((0, weight), (step, weight), ...) for one that changes.
    split: split of the source.
    **options: passed to the source.
  """
  return ConfigDict(
    {
      "source": source,
      "task": task,
      "weight": weight,
      "split": split,
      "options": options,
    }
  )


def evaluation_source(source: str, task: str, **options: Any) -> Config:
  """Returns an entry of `data.evaluation`; see `train_source`."""
  return ConfigDict({"source": source, "task": task, "options": options})


def _model_defaults() -> Config:
  model: Config = ConfigDict({"size": "micro"})
  for field in dataclasses.fields(ModelConfig):
    if field.name in _FROM_VOCABULARY or field.name == "dtype":
      continue
    origin = getattr(field.type, "__origin__", field.type)
    model[field.name] = config_dict.placeholder(origin)
  model.dtype = "auto"
  return model


def validate(config: Config) -> None:
  """Checks the keys, types and ranges of a config.

  Raises:
    UserError: naming the key, the value seen, and the nearest valid one.
  """
  _check_tree(config, default_config(), "")
  _check_sections(config)
  _check_values(config)


def _check_tree(config: Any, schema: Config, prefix: str) -> None:
  """Compares keys and types; sections that the schema leaves empty are open."""
  for key in config:
    path = f"{prefix}{key}"
    if key not in schema:
      raise UserError(
        f'unknown config key "{path}".'
        + did_you_mean(path, [f"{prefix}{name}" for name in schema])
      )
    default = schema[key]
    # Placeholders are None when read; their type is kept beside.
    kind = schema.get_type(key)
    value = config[key]
    if isinstance(default, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise UserError(f"{path}={value!r} is not a section of settings")
      if len(default):
        _check_tree(value, default, f"{path}.")
    elif value is None and default is None:
      continue
    elif not _has_type(value, kind):
      raise UserError(
        f"{path}={value!r} is not of type {kind.__name__}"
        f" (--config.{path}={default!r})"
      )
  for key in schema:
    if key not in config:
      raise UserError(
        f'config key "{prefix}{key}" is missing; start from default_config()'
      )


def _has_type(value: Any, kind: type) -> bool:
  if kind is bool:
    return isinstance(value, bool)
  if isinstance(value, bool):
    return False
  if kind is float:
    return isinstance(value, numbers.Real)
  if kind in (tuple, list):
    return isinstance(value, (tuple, list))
  return isinstance(value, kind)


def _check_sections(config: Config) -> None:
  """Checks the parts that a config file names itself."""
  for name in config.tasks:
    _one_of("tasks", name, TASKS)
    for key in config.tasks[name]:
      _one_of(f"tasks.{name}", key, default_settings(name))
  if not len(config.tasks):
    raise UserError("tasks is empty; name at least one of " + ", ".join(TASKS))
  for section, schema in (
    ("train", _TRAIN_KEYS),
    ("evaluation", _EVALUATION_KEYS),
  ):
    entries = config.data[section]
    if not len(entries):
      raise UserError(f"data.{section} is empty; name at least one source")
    for name, entry in entries.items():
      where = f"data.{section}.{name}"
      for key in entry:
        _one_of(where, key, schema)
      for key in ("source", "task"):
        if not entry.get(key):
          raise UserError(f'{where} has no "{key}" (--config.{where}.{key}=)')
      _one_of(f"{where}.task", entry.task, tuple(config.tasks))


def _one_of(key: str, value: str, options: Any) -> None:
  if value not in options:
    raise UserError(
      f'{key}: "{value}" is unknown.{did_you_mean(str(value), options)}'
    )


# key -> (lowest value, highest value); None is no limit.
_RANGES: dict[str, tuple[float, float | None]] = {
  "seed": (0, 2**32 - 1),
  "vocabulary.size": (1, None),
  "vocabulary.num_bins": (0, None),
  "vocabulary.num_codes": (0, None),
  "data.max_text_length": (1, None),
  "data.max_label_length": (1, None),
  "data.num_threads": (0, None),
  "data.prefetch": (1, None),
  "data.max_bad_fraction": (0, 1),
  "loss.label_smoothing": (0, 0.999),
  "loss.chunk_size": (0, None),
  "optimizer.learning_rate": (0, None),
  "optimizer.weight_decay": (0, None),
  "optimizer.b1": (0, 0.99999),
  "optimizer.b2": (0, 0.9999999),
  "optimizer.eps": (1e-16, None),
  "optimizer.clip_norm": (0, None),
  "optimizer.ema_decay": (0, 0.9999999),
  "train.steps": (1, None),
  "train.batch_size": (1, None),
  "train.accumulation_steps": (1, None),
  "train.log_every": (1, None),
  "train.eval_every": (0, None),
  "train.eval_examples": (1, None),
  "train.checkpoint_every": (0, None),
  "train.keep_last": (1, None),
  "evaluation.batch_size": (1, None),
  "evaluation.max_examples": (0, None),
}


def _check_values(config: Config) -> None:
  """Checks ranges and choices that do not depend on data or devices."""
  for path, (low, high) in _RANGES.items():
    value = config
    for key in path.split("."):
      value = value[key]
    top = math.inf if high is None else high
    if low <= value <= top and math.isfinite(value):
      continue
    limits = f"at least {low}" + ("" if high is None else f", at most {high}")
    near = high if high is not None and value > high else low
    raise UserError(f"{path}={value} must be {limits}: --config.{path}={near}")
  _one_of("vocabulary.source", config.vocabulary.source, VOCABULARY_SOURCES)
  _one_of("optimizer.name", config.optimizer.name, OPTIMIZERS)
  _one_of("model.dtype", config.model.dtype, DTYPES)
  _one_of("loss.confidence", config.loss.confidence, CONFIDENCE_MODES)
  size = config.data.image_size
  if len(size) != 2 or not all(isinstance(x, int) and x > 0 for x in size):
    raise UserError(
      f"data.image_size={tuple(size)} is not (height, width) in pixels:"
      " --config.data.image_size='(480,480)'"
    )


def to_json(config: Any) -> Any:
  """Returns a config as what JSON can hold; tuples become lists."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  if isinstance(config, dict):
    return {key: to_json(value) for key, value in config.items()}
  if isinstance(config, (tuple, list)):
    return [to_json(value) for value in config]
  return config


def from_json(values: dict[str, Any]) -> Config:
  """Reads what `to_json` wrote; settings that it lacks get their default."""
  config = default_config()

  def fill(section: Config, values: dict[str, Any]) -> None:
    for key, value in values.items():
      if isinstance(value, dict) and isinstance(section.get(key), ConfigDict):
        fill(section[key], value)
      else:
        if key in section:
          del section[key]
        section[key] = _tuples(value)

  fill(config, values)
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return value
