"""Compiled programs on disk: which folder, its limit, and what is found."""

import json
import os
import pathlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from absl import logging
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from narvl_jax.command_line import compilation_cache
from narvl_jax.command_line.compilation_cache import enable, remove_oldest
from tests.conftest import ROOT
from tests.support import stand_in

_VARIABLES = (
  "JAX_COMPILATION_CACHE_DIR",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
)
_SETTINGS = (
  *map(str.lower, _VARIABLES),
  "jax_enable_compilation_cache",
  "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def no_cache(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> Iterator[None]:
  """Starts without a cache, and restores that of the tests."""
  before = {name: getattr(jax.config, name) for name in _SETTINGS}
  for name in _VARIABLES:
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  jax.config.update("jax_compilation_cache_dir", None)
  jax_cache.reset_cache()
  with warnings.catch_warnings():
    yield
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def folder() -> Any:
  return jax.config.jax_compilation_cache_dir  # pyright: ignore


def test_default_folder_is_that_of_the_user(tmp_path: pathlib.Path):
  enable(None)
  path = pathlib.Path(folder())
  assert path == tmp_path / "xdg" / "narvl_jax" / "compiled"
  assert path.stat().st_mode & 0o777 == 0o700


def test_a_flag_wins_over_the_environment(tmp_path: pathlib.Path):
  jax.config.update("jax_compilation_cache_dir", "of-the-environment")
  enable(None)
  assert folder() == "of-the-environment"
  enable(str(tmp_path / "chosen"))
  assert folder() == str(tmp_path / "chosen")
  enable("off")
  assert not jax.config.jax_enable_compilation_cache  # pyright: ignore


def test_thresholds_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch):
  name = "jax_persistent_cache_min_compile_time_secs"
  jax.config.update(name, 7.0)
  monkeypatch.setenv(name.upper(), "7")
  enable(None)
  assert getattr(jax.config, name) == 7.0
  monkeypatch.delenv(name.upper())
  enable(None)
  assert getattr(jax.config, name) == 0.0


@pytest.mark.parametrize("given", [True, False])
def test_a_bucket_is_not_looked_into(given: bool):
  bucket = "gs://bucket/compiled"
  if given:
    jax.config.update("jax_compilation_cache_dir", bucket)
  enable(None if given else bucket)
  assert folder() == bucket
  xla_caches = "jax_persistent_cache_enable_xla_caches"
  assert getattr(jax.config, xla_caches) == "none"


def test_a_folder_that_cannot_be_written_is_a_warning(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  (tmp_path / "file").touch()
  said: list[str] = []
  monkeypatch.setattr(logging, "warning", lambda *x: said.append(x[0] % x[1:]))
  enable(str(tmp_path / "file" / "below"))
  assert folder() is None
  (line,) = said
  assert line.startswith("compiled programs are not kept: --compilation_cache=")
  assert line.endswith("or --compilation_cache=off")


def test_an_unknown_home_is_a_warning(monkeypatch: pytest.MonkeyPatch):
  def fails() -> pathlib.Path:
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.setattr(compilation_cache, "default_folder", fails)
  enable(None)
  assert folder() is None


def test_the_least_recently_used_are_removed(tmp_path: pathlib.Path):
  for age in range(4):
    path = tmp_path / f"jit_f-{age}-cache"
    path.write_bytes(b"x" * 10)
    os.utime(path, (1e9 - age, 1e9 - age))
  # Read since it was written.
  os.utime(tmp_path / "jit_f-3-cache", (2e9, 1e9))
  (tmp_path / "other").write_bytes(b"x" * 100)
  remove_oldest(tmp_path, 29)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "jit_f-0-cache",
    "jit_f-3-cache",
    "other",
  ]


@pytest.fixture
def misses() -> Iterator[Callable[[], int]]:
  """Returns the programs that were compiled since the last call."""
  found: list[str] = []

  def listen(event: str, **_: Any) -> None:
    found.append(event)

  jax.monitoring.register_event_listener(listen)

  def count() -> int:
    asked, hits = (
      found.count(f"/jax/compilation_cache/{name}")
      for name in ("compile_requests_use_cache", "cache_hits")
    )
    found.clear()
    return asked - hits

  yield count
  jax.monitoring.unregister_event_listener(listen)


def first_update(**settings: Any) -> float:
  """Returns the loss of the first update of a new process."""
  stand_in.setup.cache_clear()
  jax.clear_caches()
  jax_cache.reset_cache()
  run = stand_in.setup(dropout=0.5, **settings)
  state = stand_in.initial_state(run, settings.get("seed", 0))
  return float(run.train_step(state, stand_in.batch(run, 0))[1]["loss"])


def test_the_next_start_compiles_nothing(
  tmp_path: pathlib.Path, misses: Callable[[], int]
):
  warnings.simplefilter("error")
  enable(str(tmp_path / "cache"))
  losses = [first_update()]
  assert misses() > 0
  losses.append(first_update())
  losses.append(first_update(seed=1))
  losses.append(first_update(optimizer__learning_rate=0.02))
  assert misses() == 0
  assert losses[0] == losses[1] == losses[3] != losses[2]
  # Another process may have been killed while it wrote.
  for path in (tmp_path / "cache").glob("*-cache"):
    path.write_bytes(path.read_bytes()[:-10])
  assert first_update() == losses[0]
  assert misses() > 0


def test_a_library_has_no_cache():
  program = (
    "import narvl_jax.train, narvl_jax.run.training_run, jax;"
    "print(jax.config.jax_compilation_cache_dir)"
  )
  command = [sys.executable, "-c", program]
  assert subprocess.check_output(command, text=True, cwd=ROOT) == "None\n"


@pytest.mark.slow
def test_second_starts_of_commands_compile_nothing(tmp_path: pathlib.Path):
  def compiled(command: str, *flags: str) -> int:
    arguments = ["-m", "tests.programs.count_misses", f"narvl_jax.{command}"]
    result = subprocess.run(
      [sys.executable, *arguments, *flags],
      capture_output=True,
      text=True,
      cwd=ROOT,
      check=True,
    )
    counts = json.loads(result.stderr.splitlines()[-1])
    return counts["compile_requests_use_cache"] - counts.get("cache_hits", 0)

  def train(seed: int) -> int:
    return compiled(
      "train",
      "--config=tests/programs/tiny_run.py",
      f"--workdir={tmp_path / str(seed)}",
      f"--config.seed={seed}",
    )

  def others(seed: int) -> list[int]:
    run = f"--workdir={tmp_path / str(seed)}"
    return [
      compiled("evaluate", run),
      compiled("predict", run, "--example=0", "--task=vqa"),
    ]

  assert train(0) > 0
  first = others(0)
  assert train(1) == 0
  assert others(1) == [0, 0], first
