"""Defaults, the check of a config, and its form on disk."""

import importlib.util
import json
import math
from typing import Any

import pytest
from ml_collections import ConfigDict

from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import (
  Config,
  default_config,
  evaluation_source,
  from_json,
  to_json,
  train_source,
)
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.config_table import KEYS, may_change
from narvl_jax.models import ModelConfig, model_config
from tests.conftest import ROOT
from tests.support.tiny import tiny_config


def _set(config: Config, path: str, value: object) -> None:
  *sections, key = path.split(".")
  node = config
  for section in sections:
    node = node[section]
  if key in node:
    del node[key]
  node[key] = value


def test_config_of_the_tests_is_valid():
  validate(tiny_config())


def test_defaults_lack_only_tasks_and_data():
  config = default_config()
  with pytest.raises(UserError, match=r"tasks is empty; name at least one of"):
    validate(config)
  config = default_config(*TASKS)
  with pytest.raises(UserError, match=r"data.train is empty; name at least"):
    validate(config)
  config.data.train.x = train_source("shapes", "vqa")
  with pytest.raises(UserError, match=r"data.evaluation is empty"):
    validate(config)
  config.data.evaluation.x = evaluation_source("shapes", "vqa")
  validate(config, fit=False)


def test_model_section_has_every_field():
  fields = set(ModelConfig.__dataclass_fields__) - {"vocab_size", "pad_id"}
  section = default_config().model
  assert set(section) == fields | {"size"}
  # None keeps the value of the named size.
  unset = {key for key in section if section[key] is None}
  assert unset == fields - {"dtype"}
  assert model_config(section.size).width > 0


def test_empty_model_settings_accept_their_type_only():
  config = default_config()
  config.model.width = 128
  with pytest.raises(TypeError):
    config.model.num_heads = "many"


@pytest.mark.parametrize(
  "path", [name for name, row in KEYS.items() if row.low is not None]
)
def test_each_range(path):
  low, high = KEYS[path].low, KEYS[path].high
  assert low is not None
  config = tiny_config()
  # Shorter than any run.
  config.optimizer.warmup_steps = 0
  kind: Any = type(_get(config, path))
  for value in (low, high):
    if value is not None:
      _set(config, path, kind(value))
      validate(config)
  wrong = [low - 1, *([] if high is None else [high + 1])]
  if kind is float:
    wrong += [math.nan, math.inf]
  for value in wrong:
    _set(config, path, kind(value))
    near = high if high is not None and value > high else low
    message = (
      rf"^{path}={kind(value)} must be at least .*: --config.{path}={near}$"
    )
    with pytest.raises(UserError, match=message):
      validate(config)


def _get(config: Config, path: str) -> Any:
  for key in path.split("."):
    config = config[key]
  return config


@pytest.mark.parametrize(
  "path",
  [n for n, row in KEYS.items() if row.choices and row.kind is None],
)
def test_each_choice(path):
  config = tiny_config()
  several = isinstance(KEYS[path].default, tuple)
  for choice in KEYS[path].choices:
    _set(config, path, (choice,) if several else choice)
    if path not in ("vocabulary.source", "loss.average"):
      validate(config)
  wrong = f"{KEYS[path].choices[-1]}x"
  _set(config, path, (wrong,) if several else wrong)
  with pytest.raises(UserError, match=rf'^{path}: "\w+" is unknown\. Did you'):
    validate(config)


def test_every_key_is_a_row_of_the_table():
  def leaves(node: Config, prefix: str = "") -> list[str]:
    found = []
    for key in node:
      inner = isinstance(node[key], ConfigDict) and len(node[key])
      found += leaves(node[key], f"{key}.") if inner else [f"{prefix}{key}"]
    return found

  assert sorted(leaves(default_config())) == sorted(KEYS)
  for name, row in KEYS.items():
    assert row.help.endswith("."), name
    assert "\n" not in row.help
    if name.startswith("model.") and row.kind is not None:
      field = ModelConfig.__dataclass_fields__[name.removeprefix("model.")]
      declared: Any = field.type
      assert row.kind is getattr(declared, "__origin__", declared), name


@pytest.mark.parametrize(
  ("key", "resume", "read"),
  [
    ("mesh.fsdp", True, True),
    ("watchdog.step", True, True),
    ("bad_numbers.policy", True, True),
    ("data.num_workers", True, True),
    ("data.max_bad_fraction", True, True),
    ("train.keep_last", True, True),
    # Of another version.
    ("mesh.old", True, True),
    ("train.old", False, True),
    ("train.steps", False, True),
    ("data.train.vqa.options.path", False, True),
    ("evaluation.best_metric", False, True),
    ("evaluation.mask_specials", False, False),
    ("tasks.vqa.eos", False, False),
    ("optimizer.rules", False, False),
    ("old", False, False),
  ],
)
def test_keys_that_may_change(key, resume, read):
  assert may_change(key, "resume") == resume
  assert may_change(key, "resume", "report") == read


def test_the_page_of_keys_is_what_the_table_generates():
  path = ROOT / "docs" / "config_page.py"
  spec = importlib.util.spec_from_file_location("config_page", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
    "run python docs/config_page.py"
  )


def test_rules_for_weights_that_none_names():
  config = tiny_config()
  config.init_drops = ("decoder/.*",)
  with pytest.raises(
    UserError,
    match=r"init_drops=\('decoder/\.\*',\) is of use only with weights to start"
    r" from: --config.init_from=FOLDER, or --config.init_drops='\(\)'",
  ):
    validate(config)
  config.init_from = "runs/other"
  validate(config)
  config.init_renames = ("a", "b")
  with pytest.raises(UserError, match="init_renames: 'a' is not a pair"):
    validate(config)


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (
      "optimizer.learning_rat",
      0.1,
      r'unknown config key "optimizer.learning_rat".*"optimizer.learning_rate"',
    ),
    ("trian", {}, r'unknown config key "trian"\. Did you mean "train"'),
    ("train.steps", 1.5, r"train.steps=1.5 is not of type int \(--config.trai"),
    ("train.steps", True, r"train.steps=True is not of type int"),
    ("train.steps", None, r"train.steps=None is not of type int"),
    ("optimizer.ema_warmup", 1, r"ema_warmup=1 is not of type bool"),
    ("optimizer.learning_rate", "1e-3", r"learning_rate='1e-3' is not of type"),
    ("optimizer.schedule", 3, r"optimizer.schedule=3 is not of type str"),
    ("optimizer.rules", "x", r"optimizer.rules='x' is not of type tuple"),
    ("model.width", "wide", r"model.width='wide' is not of type int"),
    ("mesh", 3, r"mesh=3 is not a section of settings"),
    (
      "tracking.trackers",
      ("wandbb",),
      r'tracking.trackers: "wandbb" is unknown. Did you mean "wandb"',
    ),
    ("model.dtype", "float16", r'model.dtype: "float16" is unknown\. Did you'),
    (
      "vocabulary.source",
      "trian",
      r'vocabulary.source: "trian" is unknown\. Did you mean "train"',
    ),
    (
      "loss.confidence",
      "wieght",
      r'loss.confidence: "wieght" is unknown\. Did you mean "weight"',
    ),
    (
      "bad_numbers.policy",
      "rolback",
      r'bad_numbers.policy: "rolback" is unknown\. Did you mean "rollback"'
      r".*\(--config\.bad_numbers\.policy\)",
    ),
    ("data.image_size", (480,), r"data.image_size=\(480,\) is not \(height, w"),
    ("data.image_size", (0, 48), r"data.image_size=\(0, 48\) .*'\(48,48\)'"),
    ("data.image_size", (48.0, 48), r"data.image_size=\(48.0, 48\)"),
    ("tasks.vqq", {}, r'tasks: "vqq" is unknown\. Did you mean "vqa"'),
    (
      "tasks.vqa.promt",
      "x",
      r'tasks.vqa: "promt" is unknown\. Did you mean "prompt"',
    ),
    (
      "data.train.vqa.spilt",
      "x",
      r'data.train.vqa: "spilt" is unknown\. Did you mean "split"',
    ),
    (
      "data.train.vqa.task",
      "vqq",
      r'data.train.vqa.task: "vqq" is unknown\. Did you mean "vqa"',
    ),
    # A task that exists, but not in this run.
    (
      "data.evaluation.vqa.task",
      "caption",
      r'data.evaluation.vqa.task: "caption" is unknown\. Valid: grounding, vqa',
    ),
    (
      "data.evaluation.vqa.weight",
      2.0,
      r'data.evaluation.vqa: "weight" is unknown',
    ),
    (
      "data.train.vqa.source",
      "",
      r'data.train.vqa has no "source" \(--config.data.train.vqa.source=\)',
    ),
  ],
)
def test_mistakes(path, value, message):
  config = tiny_config()
  _set(config, path, value)
  with pytest.raises(UserError, match=message) as error:
    validate(config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["seed", "train.steps", "optimizer.rules"])
def test_missing_keys(path):
  config = tiny_config()
  *sections, key = path.split(".")
  node = config
  for section in sections:
    node = node[section]
  del node[key]
  with pytest.raises(
    UserError, match=f'config key "{path}" is missing; start from default_conf'
  ):
    validate(config)


def test_whole_numbers_will_do_for_rates():
  config = tiny_config()
  _set(config, "optimizer.weight_decay", 0)
  _set(config, "optimizer.rules", [(".*", {})])
  validate(config)


def test_form_on_disk_and_back():
  config = tiny_config()
  config.optimizer.rules = (
    ("encoder/.*", {"freeze": True}),
    (".*", {"lr": 0.5}),
  )
  _set(config, "data.train.vqa.weight", ((0, 1.0), (10, 0.5)))
  text = json.dumps(to_json(config))
  again = from_json(json.loads(text))
  validate(again)
  assert to_json(again) == to_json(config)
  assert again.data.image_size == (48, 48)
  assert again.optimizer.rules == (
    ("encoder/.*", {"freeze": True}),
    (".*", {"lr": 0.5}),
  )
  assert again.data.train.vqa.weight == ((0, 1.0), (10, 0.5))
  assert again.data.train.vqa.options.image_size == 48
  assert again.model.width == 32
  assert again.model.remat is None


def test_old_files_get_the_defaults_of_what_they_lack():
  values = to_json(tiny_config())
  del values["evaluation"]["best_metric"]
  del values["mesh"]
  again = from_json(values)
  validate(again)
  assert again.evaluation.best_metric == "mean"
  assert again.mesh.data == -1


def test_reading_changes_no_defaults():
  before = to_json(default_config())
  from_json(to_json(tiny_config()))
  assert to_json(default_config()) == before


def test_sources():
  entry = train_source("shapes", "vqa", weight=2.0, image_size=32)
  assert entry.to_dict() == {
    "source": "shapes",
    "task": "vqa",
    "weight": 2.0,
    "split": "train",
    "options": {"image_size": 32},
  }
  entry = evaluation_source("shapes", "vqa", image_size=32)
  assert entry.to_dict() == {
    "source": "shapes",
    "task": "vqa",
    "annotations": "",
    "partition": "",
    "options": {"image_size": 32},
  }


def test_entries_of_earlier_versions_get_the_new_keys():
  config = default_config("vqa")
  config.data.train.x = train_source("shapes", "vqa")
  config.data.evaluation.x = evaluation_source("shapes", "vqa", image_size=32)
  old = to_json(config)
  for key in ("annotations", "partition"):
    del old["data"]["evaluation"]["x"][key]
  assert to_json(from_json(old)) == to_json(config)


@pytest.mark.parametrize("key", ["annotations", "partition"])
def test_texts_of_an_evaluation_entry(key):
  config = default_config("vqa")
  config.data.train.x = train_source("shapes", "vqa")
  config.data.evaluation.x = evaluation_source("shapes", "vqa")
  config.data.evaluation.x = {**config.data.evaluation.x, key: 5}
  with pytest.raises(UserError, match=rf"x\.{key}=5 is not a text"):
    validate(config)
