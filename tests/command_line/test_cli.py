"""`python -m narvl_jax.train` with mistakes: one line, code 2, nothing written.

What each message says beyond the first words has its test beside the code
that raises it.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from narvl_jax.command_line import cli
from narvl_jax.command_line import messages as cli_messages
from narvl_jax.run_folder import workdir as workdir_lib
from tests.conftest import ROOT
from tests.support.tiny import tiny_config

_CONFIG = """
from tests.support.tiny import tiny_config

def get_config(arg=""):
  config = tiny_config()
  {}
  return config
"""

# Name of the config file -> what it does to the config.
_FILES = {
  "good": "",
  "unknown_key": "config.trian = 1",
  "locked_key": "config.lock(); config.train.stepz = 1",
  "raises": 'raise ValueError("no such\\n thing")',
  "user_error": (
    'from narvl_jax.errors import UserError; raise UserError("no variant")'
  ),
  "wrong_syntax": "config.train.steps = = 1",
  "wrong_import": "import narvl_jaxx",
  "wrong_weight": 'del config.data.train.vqa["weight"]\n'
  "  config.data.train.vqa.weight = ((5, 1.0),)",
}

# Name -> (flags, start of the message, a later part of it).
_CASES: dict[str, tuple[list[str], str, str]] = {
  "unknown flag": (
    ["--config=good.py", "--workdir=run", "--dryrun"],
    'unknown flag "--dryrun".',
    'Did you mean "--dry_run"?',
  ),
  "no workdir": (["--config=good.py"], "flag --workdir is required", ""),
  "empty workdir": (
    ["--config=good.py", "--workdir="],
    '--workdir="" names nothing',
    "--workdir=. for the current folder",
  ),
  "a place without folders": (
    ["--config=good.py", "--workdir=/proc/run"],
    "--workdir=/proc/run cannot be written: No such file or directory",
    "use another --workdir",
  ),
  "a name that is too long": (
    ["--config=good.py", f"--workdir=runs/{'x' * 300}"],
    '--workdir="runs/xxx',
    "File name too long",
  ),
  "no config": (["--workdir=run"], "flag --config is required", ""),
  "argument without dashes": (
    ["--config=good.py", "--workdir=run", "steps=3"],
    'unexpected argument "steps=3"',
    'flags start with "--"',
  ),
  "unknown key": (
    ["--config=good.py", "--workdir=run", "--config.train.step=3"],
    'unknown config key "train.step": no "step" in "train".',
    'Did you mean "steps"?',
  ),
  "unknown section": (
    ["--config=good.py", "--workdir=run", "--config.trian.steps=3"],
    'unknown config key "trian.steps": no "trian".',
    'Did you mean "train"',
  ),
  "key of a value": (
    ["--config=good.py", "--workdir=run", "--config.seed.value=3"],
    'config key "seed" is a value (0) and has no "value"',
    "--config.seed=",
  ),
  "wrong type": (
    ["--config=good.py", "--workdir=run", "--config.train.steps=many"],
    '--config.train.steps="many": ',
    "",
  ),
  "no file": (
    ["--config=god.py", "--workdir=run"],
    'no config file "god.py".',
    'Did you mean "good.py"?',
  ),
  "no file, with an override": (
    ["--config=god.py", "--workdir=run", "--config.train.steps=3"],
    'no config file "god.py".',
    'Did you mean "good.py"?',
  ),
  "file with an unknown key": (
    ["--config=unknown_key.py", "--workdir=run"],
    'unknown config key "trian".',
    'Did you mean "train"',
  ),
  "file that sets a key that is not there": (
    ["--config=locked_key.py", "--workdir=run"],
    "",
    'locked_key.py, line 6: no key "stepz". Did you mean "steps"?',
  ),
  "file that raises": (
    ["--config=raises.py", "--workdir=run"],
    "",
    "raises.py, line 6: ValueError: no such thing",
  ),
  "file that refuses": (
    ["--config=user_error.py", "--workdir=run"],
    "no variant",
    "",
  ),
  "file with an error of syntax": (
    ["--config=wrong_syntax.py", "--workdir=run"],
    "",
    "wrong_syntax.py, line 6: SyntaxError: invalid syntax",
  ),
  "file with an import that fails": (
    ["--config=wrong_import.py", "--workdir=run"],
    "",
    "wrong_import.py, line 6: ModuleNotFoundError: No module named 'narvl_jaxx",
  ),
  "range": (
    ["--config=good.py", "--workdir=run", "--config.optimizer.b1=1"],
    "optimizer.b1=1.0 must be at least 0, at most",
    "--config.optimizer.b1=",
  ),
  "not a number": (
    ["--config=good.py", "--workdir=run", "--config.optimizer.eps=nan"],
    "optimizer.eps=nan must be",
    "--config.optimizer.eps=",
  ),
  "devices": (
    ["--config=good.py", "--workdir=run", "--config.mesh.data=9"],
    "mesh data=9 fsdp=1 tensor=1 does not fit 8 device(s)",
    "--config.mesh.data=8",
  ),
  "workdir is a file": (
    ["--config=good.py", "--workdir=good.py"],
    "--workdir=good.py is a file, not a folder",
    "",
  ),
  "other config": (
    ["--config=good.py", "--workdir=other", "--config.train.steps=7"],
    "--workdir=other contains a run with another config:",
    "train.steps: 6 -> 7; use another --workdir",
  ),
  # These need the vocabulary, too.
  "batch": (
    ["--config=good.py", "--workdir=run", "--config.train.batch_size=12"],
    "train.batch_size=12 is not divisible by 8 device(s); nearest valid: 8 or",
    "--config.train.batch_size=8",
  ),
  "queries": (
    ["--config=good.py", "--workdir=run", "--config.model.num_queries=4"],
    'num_queries is 4, but the shortest target of "grounding" needs 5',
    "set --config.model.num_queries=",
  ),
  "labels": (
    ["--config=good.py", "--workdir=run", "--config.data.max_label_length=4"],
    "data.max_label_length=4 is shorter than every target of",
    "--config.data.max_label_length=5",
  ),
  "split of the evaluation": (
    ["--config=good.py", "--workdir=run", "--config.train.eval_split=valid"],
    'data.evaluation.grounding with train.eval_split="valid": ',
    "(--config.train.eval_split)",
  ),
  "split at the end": (
    ["--config=good.py", "--workdir=run", "--config.evaluation.split=tset"],
    'data.evaluation.grounding with evaluation.split="tset": ',
    "(--config.evaluation.split)",
  ),
  "score": (
    [
      *("--config=good.py", "--workdir=run"),
      "--config.evaluation.best_metric=caption/exact_match",
    ],
    'evaluation.best_metric="caption/exact_match" is not measured by this run',
    "(--config.evaluation.best_metric)",
  ),
  "weights": (
    ["--config=wrong_weight.py", "--workdir=run"],
    "--config.data.train.vqa.weight starts at the steps [5]",
    "",
  ),
  "source": (
    [
      "--config=good.py",
      "--workdir=run",
      "--config.data.train.vqa.source=shap",
    ],
    'data.train.vqa: Unknown source "shap". Did you mean "shapes"?',
    "(--config.data.train.vqa)",
  ),
  "rules": (
    [
      *("--config=good.py", "--workdir=run"),
      "--config.optimizer.rules=(('encode/.*', {}), ('.*', {}))",
    ],
    'optimizer.rules: "encode/.*" is never used',
    "",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("cli")
  for name, line in _FILES.items():
    (folder / f"{name}.py").write_text(_CONFIG.format(line))
  workdir_lib.write_config(folder / "other", tiny_config())
  return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, dict]:
  """Returns what every command line ended in."""
  result = subprocess.run(
    [sys.executable, "-m", "tests.programs.fork_main", "narvl_jax.train"],
    cwd=folder,
    input=json.dumps([flags for flags, _, _ in _CASES.values()]),
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return dict(zip(_CASES, json.loads(result.stdout), strict=True))


def _environment() -> dict[str, str]:
  return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("case", _CASES)
def test_mistakes_end_in_one_line(results, case):
  result = results[case]
  _, start, rest = _CASES[case]
  assert result["stderr"].startswith(f"error: {start}"), result
  assert rest in result["stderr"]
  assert len(result["stderr"].splitlines()) == 1
  assert result["stderr"].endswith("\n")
  assert result["returncode"] == 2


def test_nothing_was_written(results, folder):
  assert len(results) == len(_CASES)
  names = {f"{name}.py" for name in _FILES} | {"other"}
  assert {path.name for path in folder.iterdir()} - {"__pycache__"} == names
  assert [path.name for path in (folder / "other").iterdir()] == ["config.json"]


def test_true_command_line(folder):
  """One case without the shortcut of the others."""
  flags = ["--config=good.py", "--workdir=run", "--config.train.batchsize=8"]
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.train", *flags],
    cwd=folder,
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.splitlines() == [
    'error: unknown config key "train.batchsize": no "batchsize" in "train".'
    ' Did you mean "batch_size"?'
  ]
  assert not (folder / "run").exists()


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("train.steps", None),
    ("train", None),
    ("train.stesp", 'unknown config key "train.stesp": no "stesp" in "train".'),
    ("empty.key", 'unknown config key "empty.key": no "key" in "empty". It is'),
    ("train.steps.x", 'config key "train.steps" is a value (6) and has no "x"'),
  ],
)
def test_unknown_path(path, message):
  config = ConfigDict({"train": {"steps": 6}, "empty": {}})
  found = cli_messages.unknown_path(config, path)
  assert found == message or (found or "").startswith(str(message))


def test_a_command_that_runs_out_of_memory(monkeypatch):
  with pytest.raises(jax.errors.JaxRuntimeError) as raised:
    jax.block_until_ready(jnp.zeros(1 << 45, jnp.float32))
  found = cli_messages.memory_message(raised.value)
  size = "RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes"
  assert found == f"out of memory ({size}); use devices with more memory"
  monkeypatch.setattr(cli_messages.flags, "FLAGS", {"batch_size"})
  found = cli_messages.memory_message(raised.value)
  assert f"({size}); use a smaller --batch_size or devices" in str(found)
  assert cli_messages.memory_message(ValueError("RESOURCE_EXHAUSTED")) is None
  other = jax.errors.JaxRuntimeError("INTERNAL: a bug")
  assert cli_messages.memory_message(other) is None


def test_fail_puts_a_message_in_one_line(capsys):
  with pytest.raises(SystemExit) as error:
    cli.fail("two\n  lines")
  assert error.value.code == 2
  assert capsys.readouterr().err == "error: two lines\n"


def test_a_reader_that_stops_is_no_failure_to_explain():
  """As `| head` does."""
  program = (
    "from narvl_jax.command_line import cli\n"
    "cli.run(lambda argv: [print('-' * 99, flush=True) for _ in range(10000)])"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
  assert process.returncode == 1


def test_an_interrupted_command_ends_in_one_line():
  program = (
    "import os, signal; from narvl_jax.command_line import cli\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "cli.run(lambda argv: os.kill(os.getpid(), signal.SIGINT))"
  )
  result = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.stderr == "SIGINT: stopped\n"
  assert result.returncode == 130


_ABORTS = """
import atexit, os, sys
from narvl_jax.command_line import cli
from narvl_jax.errors import UserError

def main(argv):
  # Like threads of libraries that are still at work.
  atexit.register(os.abort)
  raise UserError("wrong") if argv[1] == "user" else RuntimeError("odd")

cli.run(main, positional=1)
"""


@pytest.mark.parametrize(
  ("kind", "code", "last"),
  [("user", 2, "error: wrong"), ("other", 1, "RuntimeError: odd")],
)
def test_what_happens_at_exit_does_not_hide_an_error(kind, code, last):
  result = subprocess.run(
    [sys.executable, "-c", _ABORTS, kind],
    env=_environment(),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == code
  assert result.stderr.splitlines()[-1] == last


_WARNS = """
import logging
from narvl_jax.command_line import cli
from narvl_jax.terminal.text import warn

def main(argv):
  warn("one\\nline")
  logging.getLogger("library").warning("of a library")
  logging.getLogger("library").error("failed")

cli.run(main)
"""


def test_warnings_begin_with_what_they_are():
  result = subprocess.run(
    [sys.executable, "-c", _WARNS],
    env=_environment(),
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stderr.splitlines() == [
    r"warning: one\nline",
    "warning: of a library",
    "error: failed",
  ]


def test_libtpu_is_quiet_without_a_tpu(monkeypatch):
  found = {"/dev/accel*": [], "/dev/vfio/[0-9]*": []}
  monkeypatch.setattr(cli.glob, "glob", found.__getitem__)
  monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v4-8")
  others = cli.LIBTPU_WITHOUT_TPU.keys() - {"TPU_ACCELERATOR_TYPE"}
  for name in others:
    monkeypatch.delenv(name, raising=False)
  found["/dev/accel*"] = ["/dev/accel0"]
  cli._quiet_libtpu()
  assert not others & os.environ.keys()
  found["/dev/accel*"] = []
  cli._quiet_libtpu()
  assert os.environ["TPU_ACCELERATOR_TYPE"] == "v4-8"
  for name in others:
    assert os.environ[name] == cli.LIBTPU_WITHOUT_TPU[name]
    monkeypatch.delenv(name)
