"""Wrong paths in flags are errors of one line."""

import ast
import errno
import os
import pathlib
import re
import sys

import pytest
from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.errors import UserError
from narvl_jax.files import paths as user_paths
from tests.conftest import ROOT
from tests.support.disks import read_only, small_disk


@pytest.fixture
def given(monkeypatch):
  """Parses flags and arguments of a command."""

  def give(*arguments: str) -> None:
    values = flags.FlagValues()
    for name in ("workdir", "to"):
      flags.DEFINE_string(name, None, "Folder.", values)
    flags.DEFINE_string("png", "x.png", "Picture.", values)
    flags.DEFINE_integer("verbosity", 0, "As absl has it.", flag_values=values)
    values(["command", *arguments])
    monkeypatch.setattr(user_paths.flags, "FLAGS", values)
    monkeypatch.setattr(sys, "argv", ["command", *arguments])

  return give


@pytest.mark.parametrize("value", ["", " ", "\t"])
@pytest.mark.parametrize("name", ["workdir", "to"])
def test_empty_paths(given, name, value):
  given(f"--{name}={value}")
  with pytest.raises(
    UserError, match=rf"^--{name}=.* names nothing; .*=\. for"
  ):
    user_paths.check_flags()


def test_a_picture_that_is_not_wanted(given):
  given("--png=", "--workdir=.")
  user_paths.check_flags()


def test_impossible_paths(given, tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  for value, reason in (
    ("x" * 300, "File name too long"),
    # The folders before it do not exist yet.
    (f"{tmp_path}/a/b/{'é' * 200}/c", "File name too long"),
    ("x/" * 3000, "File name too long"),
    (f"{tmp_path}/loop/run", "Too many levels of symbolic links"),
  ):
    given(f"--workdir={value}")
    with pytest.raises(
      UserError, match=rf'^--workdir=".*": {reason}$'
    ) as error:
      user_paths.check_flags()
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
  ("value", "reason"),
  [
    (
      "/proc/x",
      "cannot be written: No such file or directory; use another --to",
    ),
    (
      "/proc/x/y",
      "cannot be written: No such file or directory; use another --to",
    ),
    ("/dev/null", "is a file, not a folder"),
    ("/dev/null/x", "is below /dev/null, a file, not a folder"),
    (f"new/{'x' * 300}", '": File name too long'),
  ],
)
def test_folders_and_files_that_cannot_be_made(value, reason):
  with pytest.raises(UserError, match=reason):
    user_paths.check_folder("--to", value)
  # A device is a file that can be written.
  if value != "/dev/null":
    with pytest.raises(UserError, match=reason):
      user_paths.check_file("--to", f"{value}/file")


def test_read_only_places(tmp_path):
  with small_disk(tmp_path / "disk", 100) as disk:
    read_only(disk)
    for check in (user_paths.check_folder, user_paths.check_file):
      with pytest.raises(
        UserError, match=r"--to=.*cannot be written: Read-only file system \("
      ):
        check("--to", disk / "new" / "x")


def test_good_places_are_left_as_they_are(tmp_path):
  user_paths.check_folder("--to", tmp_path)
  user_paths.check_folder("--to", tmp_path / "a" / "b")
  user_paths.check_file("--to", tmp_path / "a" / "b.json")
  user_paths.check_file("--to", "/dev/null")
  assert os.listdir(tmp_path) == []
  with pytest.raises(UserError, match="is a folder; give a file in it"):
    user_paths.check_file("--to", tmp_path)


def _error(path: pathlib.Path, number: int = errno.EACCES) -> OSError:
  return OSError(number, os.strerror(number), str(path))


def test_errors_at_the_paths_of_the_user(given, tmp_path):
  given(f"--workdir={tmp_path}/a/run", "--to=out", "spec.json")
  run = tmp_path / "a" / "run"
  for path, where in (
    (run, ""),
    (run / "vocabulary" / "x", f' at "{run}/vocabulary/x"'),
    # A parent folder that cannot be created.
    (tmp_path / "a", f' at "{tmp_path}/a"'),
  ):
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = _error(path)
    text = user_paths.explain_path(wrapped)
    assert text is not None
    assert text.startswith(f'--workdir="{run}'[:90])
    assert "Permission denied" in text
    assert where[:60] in text
  assert user_paths.explain_path(_error(pathlib.Path("out", "x"))) == (
    f'--to="out": Permission denied at "{pathlib.Path("out/x").absolute()}"'
  )
  assert user_paths.explain_path(_error(pathlib.Path("spec.json"))) == (
    '"spec.json": Permission denied'
  )
  for other in (_error(tmp_path / "b"), ValueError("x"), OSError("no file")):
    assert user_paths.explain_path(other) is None


def test_a_command_ends_in_one_line(given, tmp_path, capsys, monkeypatch):
  # A relative path: long ones are shortened, and the folder of the tests may
  # have any length.
  monkeypatch.chdir(tmp_path)
  given("--to=x")

  def run(main, flags_parser):
    main(["command"])

  monkeypatch.setattr(cli.app, "run", run)
  monkeypatch.setattr(cli, "flags", flags)
  monkeypatch.setattr(cli, "leave", sys.exit)
  with pytest.raises(SystemExit) as stop:
    cli.run(lambda argv: pathlib.Path("x").read_bytes())
  assert stop.value.code == 2
  assert capsys.readouterr().err == (
    'error: --to="x": No such file or directory\n'
  )


def test_empty_arguments(capsys, monkeypatch):
  monkeypatch.setattr(cli.app, "run", lambda main, **_: main(["command", ""]))
  monkeypatch.setattr(cli, "leave", sys.exit)
  with pytest.raises(SystemExit) as stop:
    cli.run(lambda argv: None, positional=1)
  assert stop.value.code == 2
  assert "an argument is empty" in capsys.readouterr().err


# Flags with such a word in their help that have no path.
_NO_PATHS = {"name", "checkpoint", "config"}


def test_every_path_of_a_command_is_known():
  """Otherwise an empty path would mean the current folder."""
  found = set()
  for path in (ROOT / "narvl_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if not isinstance(node, ast.Call):
        continue
      texts = [
        x.value
        for x in ast.walk(node)
        if isinstance(x, ast.Constant) and isinstance(x.value, str)
      ]
      called = getattr(node.func, "attr", "")
      if called == "DEFINE_string" and re.search(
        r"\b([Ff]olders?|[Ff]iles?)\b", " ".join(texts[1:])
      ):
        found.add(texts[0])
  assert {"from", "teacher", "overlay"} <= found
  assert found - _NO_PATHS <= {*user_paths.PATH_FLAGS}
