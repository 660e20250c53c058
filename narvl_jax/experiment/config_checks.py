"""Checks a config against the default one before anything is built."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from narvl_jax.data.batches.mixture import parse_weight
from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import check_settings, default_settings
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config, default_config
from narvl_jax.experiment.config_table import KEYS
from narvl_jax.models import ModelConfig, model_config
from narvl_jax.models.encoder import (
  check_image_size,
  check_text_length,
  nearest_side,
)
from narvl_jax.parallel.rules import check_rules
from narvl_jax.state.parameters import parse_rules
from narvl_jax.state.renames import parse_drops, parse_renames

_SOURCE_KEYS = ("source", "task", "options")
_EVALUATION_KEYS = (*_SOURCE_KEYS, "annotations", "partition")
_TRAIN_KEYS = (*_SOURCE_KEYS, "weight", "split")
_SECTION = (Mapping, ConfigDict)
_TEXT_KEYS = ("source", "task", "split", "annotations", "partition")


def validate(config: Config, *, fit: bool = True) -> None:
  """Checks everything in a config that needs neither data nor devices.

  Args:
    fit: whether images and texts must fit the tables of the model.

  Raises:
    UserError: a key or value is invalid; the error names the nearest valid one.
  """
  check_types(config, flags=True)
  _check_keys(config, default_config())
  _check_sections(config)
  _check_values(config)
  _check_model(config)
  check_schedule(
    schedule=config.optimizer.schedule,
    warmup_steps=config.optimizer.warmup_steps,
    steps=config.train.steps,
  )
  parse_rules(config.optimizer.rules)
  check_rules(config.mesh.rules)
  if fit:
    check_fit(config)


def _check_keys(config: Any, schema: Config, prefix: str = "") -> None:
  """Compares keys; empty sections of the schema accept any keys."""
  for key in config:
    path = f"{prefix}{key}"
    if key not in schema:
      raise UserError(
        f'unknown config key "{path}".'
        + did_you_mean(path, [f"{prefix}{name}" for name in schema])
      )
    if isinstance(config[key], ConfigDict) and len(schema[key]):
      _check_keys(config[key], schema[key], f"{path}.")
  for key in schema:
    if key not in config:
      raise UserError(
        f'config key "{prefix}{key}" is missing; start from default_config()'
      )


def check_types(
  values: Any, schema: Any = None, prefix: str = "", *, flags: bool = False
) -> None:
  """Checks the types in a config, or in JSON that should be one.

  Unknown keys, such as those of other versions, are ignored.

  Args:
    schema: section of the default config; None: all of it.
    prefix: prefix of the section's keys.
    flags: name the flag of a wrong value.

  Raises:
    UserError: naming the key and the value.
  """
  schema = default_config() if schema is None else schema
  for key, value in values.items():
    if key not in schema:
      continue
    # Placeholders are None when read; their type is stored separately.
    path, default, kind = f"{prefix}{key}", schema[key], schema.get_type(key)
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
    if not isinstance(default, ConfigDict):
      unset = value is None and default is None
      if not unset and not _has_type(value, kind):
        flag = f" (--config.{path}={default!r})" if flags else ""
        raise UserError(f"{path}={shown} is not of type {kind.__name__}{flag}")
      continue
    inner = [value]
    if not len(default) and isinstance(value, _SECTION):
      # Empty sections of the schema contain sections of any name.
      inner += value.values()
    if not all(isinstance(x, _SECTION) for x in inner):
      raise UserError(f"{path}={shown} is not a section of settings")
    if len(default):
      check_types(value, default, f"{path}.", flags=flags)


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
  """Checks the sections whose keys a config file chooses."""
  for name in config.tasks:
    _one_of("tasks", name, TASKS)
    for key in config.tasks[name]:
      _one_of(f"tasks.{name}", key, default_settings(name))
    check_settings(name, dict(config.tasks[name]))
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
      for key in _TEXT_KEYS:
        if not isinstance(entry.get(key, ""), str):
          raise UserError(
            f"{where}.{key}={entry[key]!r} is not a text"
            f" (--config.{where}.{key})"
          )
      _check_options(where, entry.get("options", {}))
      parse_weight(name, entry.get("weight", 1.0))
      _one_of(f"{where}.task", entry.task, tuple(config.tasks))


def _check_options(where: str, options: Any) -> None:
  if not hasattr(options, "items"):
    raise UserError(
      f"{where}.options={options!r} is not a section of settings; set one of"
      f" them by --config.{where}.options.NAME="
    )


def _one_of(key: str, value: str, options: Any) -> None:
  if value not in options:
    raise UserError(
      f'{key}: "{value}" is unknown.{did_you_mean(str(value), options)}'
      f" (--config.{key})"
    )


def _check_values(config: Config) -> None:
  """Checks ranges and choices that do not depend on data or devices."""
  for path, row in KEYS.items():
    if row.kind is not None or (row.low is None and not row.choices):
      continue
    value = config
    for key in path.split("."):
      value = value[key]
    if row.choices:
      for choice in value if isinstance(row.default, tuple) else (value,):
        _one_of(path, choice, row.choices)
      continue
    near = row.nearest(value)
    if near is not None:
      raise UserError(
        f"{path}={value} must be {row.limits()}: --config.{path}={near}"
      )
  _check_decoder(config)
  _check_start(config)
  _check_profile(config)


def _check_model(config: Config) -> None:
  """Checks the model, and that pictures have two sides."""
  model = _model(config)
  size = tuple(config.data.image_size)
  if len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
    sides = [x for x in size if type(x) in (int, float) and 0 < x < math.inf]
    near = [nearest_side(model, side) for side in sides]
    height, width = (near * 2)[:2] or (nearest_side(model, 480),) * 2
    raise UserError(
      f"data.image_size={size} is not (height, width) in pixels:"
      f" --config.data.image_size='({height},{width})'"
    )


def check_fit(config: Config) -> None:
  """Checks pictures and texts against the tables of the model.

  Args:
    config: one that `validate` accepts.

  Raises:
    UserError: naming the setting to change, and the nearest valid value.
  """
  model = _model(config)
  check_image_size(model, *config.data.image_size)
  check_text_length(model, config.data.max_text_length)


def _model(config: Config) -> ModelConfig:
  """Returns the architecture for a placeholder vocabulary."""
  given = {
    name: value
    for name, value in config.model.items()
    if name not in ("size", "dtype") and value is not None
  }
  return model_config(config.model.size, **given)


def _check_start(config: Config) -> None:
  """Raises UserError for invalid rules, or rules without `init_from`."""
  parse_renames(config.init_renames)
  parse_drops(config.init_drops)
  for key in ("init_renames", "init_drops"):
    if config[key] and not config.init_from:
      raise UserError(
        f"{key}={config[key]!r} is of use only with weights to start from:"
        f" --config.init_from=FOLDER, or --config.{key}='()'"
      )


def _check_profile(config: Config) -> None:
  """Raises UserError if traces would overlap."""
  every, steps = config.profile.every, config.profile.steps
  if 0 < every < steps:
    raise UserError(
      f"profile.every={every} is below profile.steps={steps}, so traces would"
      f" overlap: --config.profile.every={steps}"
    )


def _check_decoder(config: Config) -> None:
  """Raises UserError for settings of the other kind of decoder."""
  autoregressive = config.model.decoder == "autoregressive"
  if config.loss.constrained and not autoregressive:
    raise UserError(
      "loss.constrained=True is for autoregressive models; the Query-CTC loss"
      " of a parallel one knows no constraint: --config.loss.constrained=False"
    )
  if config.distillation.teacher and autoregressive:
    raise UserError(
      f'distillation.teacher="{config.distillation.teacher}" is for parallel'
      " models; an autoregressive one learns from answers that python -m"
      " narvl_jax.distill writes: --config.distillation.teacher="
    )


def check_schedule(*, schedule: str, warmup_steps: int, steps: int) -> None:
  """Checks the learning-rate schedule of a run.

  Raises:
    UserError: unknown schedule, or a warm-up longer than the run.
  """
  _one_of("optimizer.schedule", schedule, KEYS["optimizer.schedule"].choices)
  if not 0 <= warmup_steps < steps:
    raise UserError(
      f"optimizer.warmup_steps={warmup_steps} must be at least 0 and below"
      f" train.steps={steps}: --config.optimizer.warmup_steps={steps // 10}"
    )
