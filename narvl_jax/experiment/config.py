"""The default config, entries of its data, and configs as JSON."""

from typing import Any, TypeAlias

from ml_collections import ConfigDict, config_dict

from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import default_settings
from narvl_jax.experiment.config_table import KEYS

# A ConfigDict, whose keys no type checker knows.
Config: TypeAlias = Any
# Optional texts of an entry of `data.evaluation`.
_TEXTS = {"annotations": "", "partition": ""}


def default_config(*tasks: str) -> Config:
  """Returns every setting of `config_table.KEYS` with its default.

  A key of `model` that is None has the value of the named size. A config file
  fills `data.train` and `data.evaluation` with `train_source` and
  `evaluation_source`.
  """
  config: Config = ConfigDict()
  for name, row in KEYS.items():
    section, _, key = name.rpartition(".")
    if section and section not in config:
      config[section] = ConfigDict()
    node = config[section] if section else config
    default = ConfigDict() if row.default == {} else row.default
    node[key] = (
      default if row.kind is None else config_dict.placeholder(row.kind)
    )
  for name in tasks:
    config.tasks[name] = ConfigDict(default_settings(name))
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
    weight: share of the examples, relative to the other entries; or
      ((0, weight), (step, weight), ...) for a share that changes. The flag of
      the weight accepts both forms.
    **options: passed to the source.
  """
  return ConfigDict(
    {
      "source": source,
      "task": task,
      # A plain value would restrict its flag to one type.
      "weight": config_dict.FieldReference(weight, field_type=object),
      "split": split,
      "options": options,
    }
  )


def evaluation_source(
  source: str,
  task: str,
  *,
  annotations: str = "",
  partition: str = "",
  **options: Any,
) -> Config:
  """Returns an entry of `data.evaluation`.

  Args:
    annotations: file of official annotations, see `sources.annotations`;
      `{split}` in its name is replaced by the split.
    partition: name of the way in which papers split the data, for reports.
  """
  return ConfigDict(
    {
      "source": source,
      "task": task,
      "annotations": annotations,
      "partition": partition,
      "options": options,
    }
  )


def to_json(config: Any) -> Any:
  """Returns a config as JSON values; tuples become lists."""
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  if isinstance(config, dict):
    return {key: to_json(value) for key, value in config.items()}
  if isinstance(config, (tuple, list)):
    return [to_json(value) for value in config]
  return config


def from_json(values: dict[str, Any]) -> Config:
  """Returns the config of `to_json`; missing settings get their default."""
  tasks = [name for name in values.get("tasks", {}) if name in TASKS]
  config = default_config(*tasks)

  def fill(section: Config, values: dict[str, Any]) -> None:
    for key, value in values.items():
      if isinstance(value, dict) and isinstance(section.get(key), ConfigDict):
        fill(section[key], value)
      else:
        if key in section:
          del section[key]
        section[key] = _tuples(value)

  fill(config, values)
  for name, entry in config.data.evaluation.items():
    # Entries of earlier versions lack some keys.
    if isinstance(entry, ConfigDict):
      config.data.evaluation[name] = ConfigDict({**_TEXTS, **entry})
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return value
