"""The default experiment, and configs as JSON."""

import dataclasses
from typing import Any, TypeAlias

from ml_collections import ConfigDict, config_dict

from narvl_jax.data.example import TASKS
from narvl_jax.data.tasks import default_settings
from narvl_jax.models import ModelConfig
from narvl_jax.parallel.rules import DEFAULT_RULES

# A ConfigDict, whose keys no type checker knows.
Config: TypeAlias = Any


# Fields of ModelConfig that follow from the vocabulary.
_FROM_VOCABULARY = ("vocab_size", "pad_id")


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
  # Folder of a run or of converted weights to start from; "": random weights.
  # A parallel model may start from its autoregressive twin, and the reverse.
  config.init_from = ""
  # ((regex, replacement), ...): stored names that are others here; the first
  # that matches a whole name counts, "\\1" is its first group.
  config.init_renames = ()
  # (regex, ...): names, after the renames, that are not taken from there but
  # stay as they were initialised.
  config.init_drops = ()
  config.model = _model_defaults()
  config.vocabulary = _vocabulary_defaults()
  config.tasks = ConfigDict({name: default_settings(name) for name in tasks})
  config.data = _data_defaults()
  config.loss = _loss_defaults()
  config.distillation = _distillation_defaults()
  config.optimizer = _optimizer_defaults()
  config.train = _train_defaults()
  config.bad_numbers = _bad_numbers_defaults()
  config.evaluation = _evaluation_defaults()
  config.watchdog = _watchdog_defaults()
  config.mesh = _mesh_defaults()
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
      ((0, weight), (step, weight), ...) for one that changes. Its flag takes
      either, whichever the config file has.
    split: split of the source.
    **options: passed to the source.
  """
  return ConfigDict(
    {
      "source": source,
      "task": task,
      # The type of a plain value would bind its flag to that type.
      "weight": config_dict.FieldReference(weight, field_type=object),
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


def _vocabulary_defaults() -> Config:
  """Returns where tokens come from."""
  return ConfigDict(
    {
      # "train" makes one from the training data, "run" takes that of the run in
      # the folder `path`; else `path` holds the files.
      "source": "train",
      "size": 1000,
      "path": "",
      "num_bins": 1000,
      "num_codes": 0,
    }
  )


def _data_defaults() -> Config:
  """Returns what is read, and how it is prepared."""
  return ConfigDict(
    {
      "image_size": (480, 480),
      # "ignore" reads pictures as they are stored, as the reference does;
      # "apply" turns them upright as their EXIF orientation says.
      "exif_orientation": "ignore",
      "max_text_length": 80,
      "max_label_length": 20,
      # Processes that prepare batches; 0: only threads of the main one.
      "num_workers": 0,
      # Threads of each such process.
      "num_threads": 2,
      # Batches that each prepares ahead.
      "prefetch": 4,
      # Share of a source's records that may be unusable.
      "max_bad_fraction": 0.01,
      # Above 0, shares also depend on the sizes of the sources: in proportion
      # at 1, ever more even above.
      "temperature": 0.0,
      # NAME: train_source(...)
      "train": {},
      # NAME: evaluation_source(...)
      "evaluation": {},
    }
  )


def _loss_defaults() -> Config:
  """Returns the settings of the losses."""
  return ConfigDict(
    {
      "label_smoothing": 0.0,
      "confidence": "weight",
      # Classes whose logits exist at a time; 0: all. A larger vocabulary is
      # computed twice, in chunks; see README.
      "chunk_size": 4096,
      # Autoregressive models only. Whether a batch is averaged over its
      # "labels" (reference) or "examples", as that of parallel models is: with
      # tasks of long and of short answers the short ones then count as much.
      "average": "labels",
      # Renormalise over what may follow in the closed answer sets of VQA and
      # entailment.
      "constrained": False,
      # Leave out this share of the labels, the worst, from an update on.
      "drop_worst": 0.0,
      "drop_worst_after": 0,
    }
  )


def _distillation_defaults() -> Config:
  """Returns how to learn what an autoregressive model says at each label.

  Parallel models only; see narvl_jax/training/objective.py.
  """
  return ConfigDict(
    {
      # Folder of its run, with the vocabulary of this one; "": none.
      "teacher": "",
      # Share of this loss; the rest is that of the labels.
      "weight": 0.5,
      # Above 1 softens both distributions.
      "temperature": 1.0,
    }
  )


def _optimizer_defaults() -> Config:
  """Returns how parameters change."""
  return ConfigDict(
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


def _train_defaults() -> Config:
  """Returns the length of a run, and what it does how often."""
  return ConfigDict(
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
      # Checkpoints that stay: the last ones, the best ones by
      # `evaluation.best_metric`, and those of every n-th step (0: none).
      "keep_last": 2,
      "keep_best": 1,
      "keep_every": 0,
    }
  )


def _bad_numbers_defaults() -> Config:
  """Returns what to do when the loss or the gradient is not finite.

  Such an update changes nothing.
  """
  return ConfigDict(
    {
      # "stop" the run, "skip" the update, or "rollback": go back to the last
      # checkpoint, and on with the batch after the bad one.
      "policy": "stop",
      # Skipped updates, or rollbacks, after which the run stops after all.
      "limit": 10,
      # Losses above so many times the median of the last 100 are counted as
      # spikes; 0: none.
      "spike_factor": 3.0,
    }
  )


def _evaluation_defaults() -> Config:
  """Returns how a trained model is evaluated."""
  return ConfigDict(
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


def _watchdog_defaults() -> Config:
  """Returns by phase how long a run may stand still, in seconds; 0: for ever.

  Then it writes the stacks of its threads and ends, so that it can be started
  again.
  """
  return ConfigDict(
    {
      # Reading, connecting, restoring.
      "start": 3600.0,
      "compile": 3600.0,
      "step": 900.0,
      "data_wait": 900.0,
      # Between two batches, the first of which are compiled.
      "evaluation": 3600.0,
      "checkpoint": 1800.0,
      "other": 1800.0,
    }
  )


def _mesh_defaults() -> Config:
  """Returns how the devices share the work."""
  return ConfigDict(
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
  return config


def _tuples(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_tuples(item) for item in value)
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return value
