"""Settings of all tests; the environment is set before jax is imported."""

import gc
import importlib.metadata
import os
import pathlib
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def xla_flags(devices: int) -> str:
  """Returns flags for fake devices and fast compilation.

  Tests spend far longer on compiling than on running programs.
  """
  flags = [
    f"--xla_force_host_platform_device_count={devices}",
    "--xla_backend_optimization_level=0",
  ]
  # Later versions have a single code generator and reject the flag.
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
  return " ".join(flags)


# Only once: workers inherit the flags, which are part of the cache key. The
# user's flags come last, so that they take precedence.
if xla_flags(8) not in os.environ.get("XLA_FLAGS", ""):
  own = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {own}".strip()
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  os.path.join(tempfile.gettempdir(), "narvl_jax_test_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# jax writes an entry of the cache in place: a process may read half of it, and
# then compiles. Processes of tests do not warn of that, nor do tests
# (pyproject.toml).
_TORN = "ignore:Error reading persistent compilation cache entry"
if _TORN not in os.environ.get("PYTHONWARNINGS", ""):
  others = os.environ.get("PYTHONWARNINGS", "")
  os.environ["PYTHONWARNINGS"] = f"{others},{_TORN}".strip(",")

import jax
import pytest
from absl import flags

from tests.stores.fixtures import gcs as gcs
from tests.stores.fixtures import gcs_server as gcs_server
from tests.stores.fixtures import no_waiting as no_waiting
from tests.stores.fixtures import s3 as s3
from tests.stores.fixtures import s3_server as s3_server

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# Every compiled program uses memory maps. Linux allows 65,530 per process and
# jax crashes beyond that.
_MAPS = pathlib.Path("/proc/self/maps")
_MOST_MAPS = 20_000


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption(
    "--slow", action="store_true", help="also run the tests marked slow"
  )
  parser.addoption(
    "--update_golden",
    action="store_true",
    help="rewrite the texts in tests/golden with the current output",
  )


def pytest_configure(config: pytest.Config) -> None:
  # pytest-xdist distributes files in our order, not by their number of tests.
  config.option.loadscopereorder = False
  # As in `cli.run`: tracing is most of what tests do.
  gc.set_threshold(100_000, 20, 100)
  # grain reads absl flags in its workers.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  # Files with slow tests take longest: none of them is left for one process
  # while the others have nothing to do.
  slow = {item.path for item in items if "slow" in item.keywords}
  items.sort(key=lambda item: item.path not in slow)
  if config.getoption("--slow"):
    return
  skip = pytest.mark.skip(reason="slow: run with --slow")
  for item in items:
    if "slow" in item.keywords:
      item.add_marker(skip)


# A warning, or an error in a destructor, as Python prints it.
_COMPLAINT = re.compile(
  r"^(\S+:\d+: \w*Warning: |Exception ignored in).*", re.M
)


@pytest.fixture(autouse=True, scope="session")
def quiet_commands() -> Iterator[None]:
  """Fails a test if a command it runs prints a warning."""
  run = subprocess.run

  def checked_run(*args: Any, **kwargs: Any) -> Any:
    result = run(*args, **kwargs)
    if isinstance(result.stderr, str):
      complaint = _COMPLAINT.search(result.stderr)
      assert complaint is None, result.stderr
    return result

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subprocess, "run", checked_run)
    yield


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
  """Restores signal handlers.

  Child processes inherit ignored signals, which shells cannot trap.
  """
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [signal.getsignal(number) for number in numbers]
  yield
  for number, handler in zip(numbers, before, strict=True):
    signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
  """Drops compiled programs when there are many; they stay cached on disk."""
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def shared_files() -> pathlib.Path:
  """Returns the folder of parity files; skips the test without it."""
  if not (SHARED / "fixtures" / "README.md").exists():
    pytest.skip("parity files (../shared) are absent")
  return SHARED


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
  """Returns a function that compares a text with `tests/golden/NAME`."""

  def compare(name: str, text: str) -> None:
    path = ROOT / "tests" / "golden" / name
    if request.config.getoption("--update_golden"):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no {path}; write it with pytest --update_golden"
    assert text == path.read_text(encoding="utf-8"), (
      f"differs from {path}; if intended: pytest --update_golden"
    )

  return compare
