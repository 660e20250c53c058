"""The wheel: it contains what the checkout has, and runs without it."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from narvl_jax import __main__ as commands

ROOT = pathlib.Path(__file__).resolve().parent.parent
_BUILT_FROM = ("narvl_jax", "configs")
_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Builds the wheel from a copy, since a build writes beside its sources."""
  copy = tmp_path_factory.mktemp("copy")
  ignored = shutil.ignore_patterns("__pycache__")
  for name in _BUILT_FROM:
    shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
  for name in _FILES:
    shutil.copy(ROOT / name, copy / name)
  folder = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
  subprocess.run(
    [*command, "--no-build-isolation", f"--wheel-dir={folder}", str(copy)],
    check=True,
  )
  (path,) = folder.glob("narvl_jax-*.whl")
  return path


def test_the_wheel_contains_all_modules_and_nothing_else(wheel: pathlib.Path):
  expected = {
    str(path.relative_to(ROOT))
    for name in ("narvl_jax", "narvl_jax/configs")
    for path in (ROOT / name).rglob("*.py")
  }
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  assert {name for name in names if name.endswith(".py")} == expected
  assert "narvl_jax/configs/shapes.py" in names
  tops = {name.split("/")[0].split("-")[0] for name in names}
  assert tops == {"narvl_jax"}


def test_the_wheel_runs_away_from_the_checkout(
  wheel: pathlib.Path, tmp_path: pathlib.Path
):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "installed")

  def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [sys.executable, "-m", *arguments],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )

  listed = run("narvl_jax")
  assert (listed.stdout, listed.stderr) == (commands.usage() + "\n", "")
  # The message comes from the config itself, so that its file was found.
  found = run("narvl_jax.train", "--config=shapes:nothing", "--workdir=new")
  assert found.returncode == 2
  assert "quick" in found.stderr
  assert not (tmp_path / "new").exists()
