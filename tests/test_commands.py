"""The list of commands, commands by their old names, and configs by name."""

import pathlib
import subprocess
import sys

import pytest

from narvl_jax import __main__ as commands
from narvl_jax.command_line import config_names

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _run(*arguments: str, folder: pathlib.Path | None = None):
  return subprocess.run(
    [sys.executable, "-m", *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=folder,
    env=None,
  )


def test_every_command_is_listed():
  found = {
    path.stem
    for path in (ROOT / "narvl_jax").glob("*.py")
    if "cli.run(" in path.read_text(encoding="utf-8")
  }
  assert set(commands.COMMANDS) == found
  text = commands.usage()
  for name in commands.COMMANDS:
    assert f"\n  {name} " in text


def test_the_list_is_printed_and_a_wrong_name_is_rejected():
  listed = _run("narvl_jax")
  assert (listed.returncode, listed.stderr) == (0, "")
  assert listed.stdout == commands.usage() + "\n"
  wrong = _run("narvl_jax", "evalute")
  assert wrong.returncode == 2
  assert wrong.stderr == (
    'error: no command "evalute". Did you mean "evaluate"?\n'
  )


def test_a_command_runs_by_its_name():
  result = _run("narvl_jax", "check-data", "--help")
  assert result.returncode == 0
  assert "narvl_jax.check_data" in result.stdout


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("data.check", "check_data"),
    ("data.convert", "convert_data"),
    ("data.answers", "list_answers"),
  ],
)
def test_old_names_run_with_a_note(old, new):
  result = _run(f"narvl_jax.{old}", "--help")
  assert result.returncode == 0
  assert f"narvl_jax.{new}" in result.stdout
  assert result.stderr == (
    f"note: narvl_jax.{old} is now called narvl_jax.{new}\n"
  )


def test_configs_by_name():
  names = config_names.config_names()
  assert {"shapes", "easy_vqa", "own_data", "refcoco", "pod"} <= set(names)
  assert not {"common", "official", "__init__"} & set(names)
  argv = ["train", "--config=shapes:quick", "-config=pod", "--workdir=shapes"]
  file = str(config_names.CONFIGS / "shapes.py")
  assert config_names.resolve_names(argv) == [
    "train",
    f"--config={file}:quick",
    f"-config={config_names.CONFIGS / 'pod.py'}",
    "--workdir=shapes",
  ]
  others = ["--config=configs/shapes.py", "--config=nothing", "--config=common"]
  assert config_names.resolve_names(others) == others
