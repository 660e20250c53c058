"""The benchmark of checkpoints at tiny sizes: its report, not its times."""

import json
import pathlib
from typing import Any

import pytest

from narvl_jax.benchmarks import checkpoints
from narvl_jax.checkpointing.writing import Checkpoints
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def report(folder: pathlib.Path) -> dict[str, Any]:
  return checkpoints.benchmark(tiny_config(), folder, steps=3, rounds=1)


def test_saves_and_restores_are_timed(
  report: dict[str, Any], folder: pathlib.Path
) -> None:
  # One to begin with, one in the loop and one at rest.
  with Checkpoints(folder) as store:
    assert store.steps()[-1] == 3
  seconds = {name: x["median"] for name, x in report["seconds"].items()}
  assert all(value > 0 for value in seconds.values())
  # Parameters, two moments and averages.
  assert report["state_bytes"] > 16 * report["sizes"]["parameters"]
  assert report["checkpoint_bytes"] > report["state_bytes"]
  blocked = report["seconds"]["blocked by a save"]
  assert blocked["max"] <= report["seconds"]["committed, in the loop"]["max"]
  share = report["share"]["blocked"]["median"]
  plain = 3 * seconds["one update"]
  assert share == pytest.approx(blocked["median"] / plain)


def test_table_names_what_was_measured(report: dict[str, Any]) -> None:
  text = checkpoints.format_report(report)
  assert "checkpoints: steps=3 parameters=" in text
  for line in (
    "one update ",
    "blocked by a save ",
    "committed, in the loop ",
    "committed, at rest ",
    "restored, first ",
    "restored, second ",
    "of 3 updates ",
    "whole cost ",
    "whole cost, CPU time ",
  ):
    assert f"\n{line}" in text
  assert "MB, first save" in text
  json.dumps(report)
