"""Every key of every config file, given a value of a wrong type or range."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict

from narvl_jax.command_line import cli
from narvl_jax.command_line.flag_parsing import normalise
from narvl_jax.command_line.messages import load_config
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import default_config, train_source
from narvl_jax.experiment.config_checks import check_fit, validate
from tests.conftest import ROOT

_SHARED = ("__init__", "common", "official")
_FILES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in _SHARED
)
_VALUES = (
  *("wrong", "2.5", "-1", "nan", "None", "True", "", "(1,", "{}", "[[1]]"),
  "((0,0.5),(100,2.0))",
)


@pytest.fixture(autouse=True)
def own_flags(monkeypatch) -> Iterator[None]:
  monkeypatch.setattr(sys, "argv", ["train"])
  yield
  _forget_flags()


def _forget_flags() -> None:
  for name in list(flags.FLAGS):
    if name == "config" or name.startswith("config."):
      delattr(flags.FLAGS, name)


def _file(name: str) -> str:
  return str(ROOT / "configs" / f"{name}.py")


def _leaves(node: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields every key, sections too."""
  for key, value in node.items():
    yield prefix + key, value
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f"{prefix}{key}.")


def _parse(capsys, *arguments: str) -> tuple[Any, str]:
  """Returns the config that a command line gives, or the error and its line."""
  _forget_flags()
  cli.define_config_flag()
  sys.argv = normalise(["train", *arguments])
  try:
    cli._parse_flags(sys.argv)
    validate(flags.FLAGS.config)
    check_fit(flags.FLAGS.config)
  except SystemExit as error:
    if error.code != 2:
      raise
    return None, capsys.readouterr().err
  except UserError as error:
    return None, f"error: {error}\n"
  return flags.FLAGS.config, ""


def _has_no_wrong_type(value: Any) -> bool:
  """Returns whether any text is a value of the type of this one."""
  return isinstance(value, str) or value is None


@pytest.mark.parametrize("name", _FILES)
def test_a_value_of_a_wrong_type_ends_in_one_line(name, capsys):
  config = load_config(_file(name))
  assert config is not None
  for path, value in _leaves(config):
    argument = f"--config.{path}=wrong"
    found, message = _parse(capsys, f"--config={_file(name)}", argument)
    if _has_no_wrong_type(value) and not message:
      continue
    assert found is None, argument
    assert message.startswith("error: "), argument
    assert message.count("\n") == 1, (argument, message)
    assert "ConfigDict" not in message
    assert path.rsplit(".", maxsplit=1)[-1] in message, (argument, message)


def test_any_value_is_accepted_or_ends_in_one_line(capsys):
  config = load_config(_file("shapes"))
  assert config is not None
  for path, _ in _leaves(config):
    for text in _VALUES:
      argument = f"--config.{path}={text}"
      found, message = _parse(capsys, f"--config={_file('shapes')}", argument)
      assert found is not None or message.startswith("error: "), argument
      assert message.count("\n") <= 1, (argument, message)


@pytest.mark.parametrize("name", _FILES)
def test_a_weight_and_a_schedule_work_on_every_config(name, capsys):
  config: Any = load_config(_file(name))
  assert config is not None
  key = f"--config.data.train.{next(iter(config.data.train))}.weight"
  for text, value in (
    ("2", 2),
    ("2.5", 2.5),
    ("((0,0.5),(100,2.0))", ((0, 0.5), (100, 2.0))),
    ("[[0, 1], [7, 0]]", [[0, 1], [7, 0]]),
  ):
    for form in ([f"{key}={text}"], [key, text]):
      # The file of one's own data lacks a path, which is not asked for here.
      found, message = _parse(capsys, f"--config={_file(name)}", *form)
      assert not message
      entry = next(iter(found.data.train.values()))
      assert entry.weight == value


@pytest.mark.parametrize(
  "text", ["heavy", "-1", "nan", "True", "(1,2)", "((5,1.0),)", "((0,),)", "()"]
)
def test_a_wrong_weight_names_its_flag_and_both_forms(text, capsys):
  flag = "--config.data.train.vqa.weight"
  _, message = _parse(capsys, f"--config={_file('shapes')}", f"{flag}={text}")
  assert message.startswith(f"error: {flag} ")


def test_files_may_set_either_form():
  config = default_config("vqa")
  config.data.train.x = train_source("shapes", "vqa")
  config.data.train.x.weight = ((0, 1.0), (5, 2.0))
  config.data.train.x.weight = 3.0
  assert config.to_dict()["data"]["train"]["x"]["weight"] == 3.0


@pytest.mark.parametrize(
  ("name", "text", "near"),
  [
    ("shapes", "50", "(48,48)"),
    ("shapes", "(50,)", "(48,48)"),
    ("shapes", "(1000,30)", "(64,32)"),
    ("shapes", "(0,48)", "(48,48)"),
    ("shapes", "wrong", "(64,64)"),
    ("own_data", "(63,64)", "(64,64)"),
    ("refcoco", "5000", "(672,672)"),
  ],
)
def test_the_suggested_size_of_pictures_is_valid(name, text, near, capsys):
  arguments = (f"--config={_file(name)}", f"--config.data.image_size={text}")
  _, message = _parse(capsys, *arguments)
  flag = f"--config.data.image_size='{near}'"
  assert message.rstrip().endswith(flag)
  found, message = _parse(capsys, arguments[0], flag.replace("'", ""))
  assert not message
  assert found is not None


def test_a_warm_up_that_is_too_long_needs_no_data(capsys):
  _, message = _parse(
    capsys,
    f"--config={_file('refcoco')}",
    "--config.train.steps=10",
    "--config.optimizer.warmup_steps=50",
  )
  assert message == (
    "error: optimizer.warmup_steps=50 must be at least 0 and below"
    " train.steps=10: --config.optimizer.warmup_steps=1\n"
  )


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("train.steps=many", "not a whole number; the config has 2000"),
    ("optimizer.b2=many", "not a number; the config has 0.98"),
    ("optimizer.ema_warmup=2", "neither true nor false; the config has True"),
    (
      "data.image_size=(1,",
      "not a tuple in Python's notation; the config has (48, 48)",
    ),
    (
      "loss=3",
      "this is a section of settings; set one of its keys, such as"
      " --config.loss.average=labels",
    ),
    ("model.num_heads=x", "not a whole number; the config has 4"),
    ("model.remat=x", ""),
    ("model.resnet_width=x", "not a whole number"),
  ],
)
def test_a_wrong_type_names_the_right_one(argument, message, capsys):
  name, _, value = argument.partition("=")
  _, found = _parse(
    capsys, f"--config={_file('shapes')}", f"--config.{argument}"
  )
  if message:
    assert found == f'error: --config.{name}="{value}": {message}\n'
  for internal in ("ConfigDict", "malformed", "literal", "ast."):
    assert internal not in found
