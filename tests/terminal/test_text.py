"""Untrusted text on terminals and in files."""

import ast
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import logging

from narvl_jax.command_line import cli
from narvl_jax.errors import UserError
from narvl_jax.reliability.explain import describe_failure
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run.announce import Announcer
from narvl_jax.terminal.text import (
  brief,
  escape,
  readable_json,
  show,
  show_error,
  warn,
)
from tests.conftest import ROOT

# What a string of Python may contain, and no terminal should get as it is.
NASTY = (
  "\x1b]0;owned\x07 \x00 \x7f \x9b31m \u202eevil\u2069 \ud83d \n \r\u2028"
  " \ufeff \U000e0061"
)
# Modules that print no text of others, or do so by `show`.
_MAY_PRINT = ("benchmarks/", "terminal/text.py")


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("plain text", "plain text"),
    ("Größe 火 😀 [red]", "Größe 火 😀 [red]"),
    # Joiners are part of words and of emoji.
    ("क\u200cष 👩\u200d🚒", "क\u200cष 👩\u200d🚒"),
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("a\nb\tc\rd", r"a\nb\tc\rd"),
    ("\x9b1m\x7f", r"\x9b1m\x7f"),
    ("\u202ecod.exe", r"\u202ecod.exe"),
    ("\ud83d", r"\ud83d"),
    ("\u2028", r"\u2028"),
    ("\U000e0061", r"\U000e0061"),
  ],
)
def test_escape(text: str, shown: str) -> None:
  assert escape(text) == shown
  assert escape(shown) == shown


def test_cells_are_brief() -> None:
  assert brief("größe") == "größe"
  assert brief("x" * 60) == "x" * 60
  assert brief("\x1b" + "x" * 60) == r"\x1b" + "x" * 56 + "..."


def test_escape_keeps_what_is_asked_for() -> None:
  assert escape("a\tb\nc\x1b", keep="\n") == "a\\tb\nc\\x1b"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "cp1252"])
def test_show_on_any_terminal(encoding: str) -> None:
  raw = io.BytesIO()
  stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
  show(f"Größe 火 {NASTY}", file=stream)
  shown = raw.getvalue().decode(encoding)
  assert shown.endswith("\n")
  assert "\x1b" not in shown
  assert r"\x1b]0;owned\x07" in shown
  assert ("火" in shown) == (encoding == "utf-8")
  assert r"\ud83d" in shown


def test_readable_json() -> None:
  value = {NASTY: [NASTY, "Größe 😀", 1.5, None], "list": []}
  for indent in (None, 2):
    text = readable_json(value, indent=indent)
    assert json.loads(text) == value
    assert "Größe 😀" in text
    assert escape(text, keep="\n") == text
    text.encode()
    assert len(text.splitlines()) == (
      1 if indent is None else text.count("\n") + 1
    )
  assert json.loads(readable_json(value, "ascii")) == value
  assert readable_json(value, "ascii").isascii()


def test_readable_json_rejects_nan() -> None:
  with pytest.raises(ValueError, match="JSON compliant"):
    readable_json([float("nan")])


def test_warning(caplog: pytest.LogCaptureFixture) -> None:
  with caplog.at_level("WARNING", logger=logging.get_absl_logger().name):
    warn(f"bad: {NASTY}")
  (line,) = caplog.messages
  assert line == f"bad: {escape(NASTY)}"


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
  with pytest.raises(SystemExit):
    cli.fail(f"the key {NASTY} is unknown")
  out = capsys.readouterr().err
  assert out.count("\n") == 1
  assert r"\x1b]0;owned\x07" in out
  assert "\x1b" not in out


def test_lines_of_a_run(
  capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
  Announcer(Ledger())(f"used of {NASTY}: [red]")
  out = capsys.readouterr().out
  assert out.count("\n") == 1
  assert f"{escape(NASTY)}: [red]" in out
  code, message = describe_failure(UserError(f"a\nb {NASTY}"), tmp_path)
  assert code == 2
  assert "\n" not in message


def test_traceback_shows_no_control_characters(
  capsys: pytest.CaptureFixture[str],
) -> None:
  try:
    raise TypeError(NASTY)
  except TypeError as error:
    show_error(type(error), error, error.__traceback__)
  out = capsys.readouterr().err
  assert out.startswith("Traceback (most recent call last):\n")
  assert "\x1b" not in out
  assert r"\x1b]0;owned" in out


def test_a_command_survives_an_ascii_terminal(tmp_path: pathlib.Path) -> None:
  rows = [
    {"image": "no.png", "target": "Größe", "\x1b]0;owned\x07": 1},
    {"image": "no\x1b[2J.png", "target": "two"},
  ]
  path = tmp_path / "größe\x1b[31m.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  done = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.check_data", str(path)),
      *("--task=vqa", "--png="),
    ],
    cwd=ROOT,
    env={**os.environ, "PYTHONIOENCODING": "ascii"},
    capture_output=True,
    check=False,
  )
  out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
  # Every record is bad.
  assert done.returncode == 2, err
  assert "\x1b" not in out + err
  assert r"\x1b]0;owned\x07" in out
  assert r"no\x1b[2J.png" in out
  assert "verdict: not usable" in out


def test_modules_print_by_show() -> None:
  root = ROOT / "narvl_jax"
  found = []
  for path in sorted(root.rglob("*.py")):
    name = path.relative_to(root).as_posix()
    if name.startswith(_MAY_PRINT):
      continue
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      call = node.func if isinstance(node, ast.Call) else None
      bare = isinstance(call, ast.Name) and call.id == "print"
      log = (
        isinstance(call, ast.Attribute)
        and call.attr == "warning"
        and isinstance(call.value, ast.Name)
        and call.value.id == "logging"
      )
      if call is not None and (bare or log):
        found.append(f"{name}:{call.lineno}")
  assert not found, "use narvl_jax.terminal.text.show or warn"


# What a command may print, and how.
_COMMAND = """
import sys
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import write_report
from narvl_jax.terminal.text import show

def main(argv):
  if argv[1] == "show":
    show("words")
  elif argv[1] == "json":
    write_report("-", {"a": 1})
  elif argv[1] == "late":
    sys.stdout.write("words")
  elif argv[1] == "exit":
    sys.stdout.write("words")
    sys.exit(0)
  elif argv[1] == "file":
    with open(argv[2], "w") as file:
      show("words")
    show(open(argv[2]).read() or "nothing", file=sys.stderr)

if __name__ == "__main__":
  cli.run(main, positional=(1, 2))
"""


@pytest.mark.parametrize("how", ["show", "json", "late", "exit", "--help"])
def test_a_full_stdout_is_reported(how):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  # What is not flushed fails as late as it can.
  environment.pop("PYTHONUNBUFFERED", None)
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      [sys.executable, "-c", _COMMAND, how],
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
  assert (done.returncode, done.stderr) == (
    2,
    "error: stdout cannot be written: No space left on device; redirect it"
    " to a writable file or pipe\n",
  )


def test_a_closed_stdout_does_not_end_up_in_a_file(tmp_path):
  done = subprocess.run(
    [
      *("sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", _COMMAND),
      *("file", str(tmp_path / "file")),
    ],
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert (done.returncode, done.stderr) == (0, "nothing\n")
