"""Memory of saving and restoring, measured in separate processes."""

import json
import pathlib
from typing import Any

import pytest

from tests.support.processes import start


def _run(folder: pathlib.Path, mode: str) -> Any:
  process = start(
    folder,
    ["-m", "tests.programs.memory_program", str(folder / "run"), mode],
    devices=1,
    name=mode,
  )
  assert process.wait() == 0, process.errors
  return json.loads(process.output)


@pytest.mark.slow
def test_memory_of_saving_and_restoring(tmp_path, monkeypatch):
  # With one arena the cache of the C library does not hide a leak.
  monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
  found = _run(tmp_path, "save")
  assert len(found) == 20
  # The state is a large part of it, so that a copy would be visible.
  assert 200 < found[4] < 1000
  assert found[19] < 1.05 * found[4], found
  monkeypatch.delenv("MALLOC_ARENA_MAX")
  restored = _run(tmp_path, "restore")
  assert restored["size"] == pytest.approx(200, abs=1)
  # No second copy; includes the compiled program of the checksums.
  assert restored["peak"] < 1.3 * restored["size"], restored
