"""The benchmark of the loss heads at tiny sizes: its report, not its times."""

import json
import subprocess
import sys

import pytest

from narvl_jax.benchmarks import loss_head, timing
from narvl_jax.errors import UserError

TINY = loss_head.HeadSizes(
  batch=16, num_queries=6, labels=4, width=8, vocab_size=5000, chunk_size=300
)


@pytest.fixture(scope="module")
def report():
  return loss_head.benchmark(TINY, rounds=2)


def test_heads_agree(report):
  assert list(report["results"]) == ["plain", "chunked", "optax.ctc_loss"]
  for result in report["results"].values():
    assert result["loss_difference"] < 1e-5
    assert result["gradient_difference"] < 1e-5
  assert report["results"]["chunked"]["gradient_difference"] > 0


def test_only_one_head_has_the_logits(report):
  size = report["logits_bytes"]
  assert size == 16 * 6 * 5000 * 4
  plain, chunked, _ = report["results"].values()
  assert chunked["temp_bytes"] < 0.6 * size < plain["temp_bytes"]
  # The gradients of states and table, and the loss.
  assert plain["output_bytes"] >= 4 * (16 * 6 * 8 + 5000 * 8 + 1)


def test_peak_is_that_of_the_run():
  peak, result = timing.peak_memory(lambda: b"x" * 2**26)
  assert len(result) == 2**26
  if peak is None:
    pytest.skip("the high-water mark of memory cannot be reset here")
  assert 2**25 < peak < 2**28
  again, _ = timing.peak_memory(lambda: 1)
  assert again is not None
  assert again < 2**25


def test_table_names_what_was_measured(report):
  text = loss_head.format_report(report)
  assert "labels=4 width=8 vocab_size=5000 chunk_size=300" in text
  heading, line, *rows = text.splitlines()[4:]
  columns = ("ms, median (min..max)", "ratio", "temp MB", "peak MB")
  assert all(column in heading for column in columns)
  assert set(line) == {"-"}
  assert len(rows) == 3


def test_half_precision():
  sizes = loss_head.HeadSizes(2, 3, 2, 8, 50, 16, "bfloat16")
  results = loss_head.benchmark(sizes, rounds=1)["results"]
  assert 0 < results["chunked"]["gradient_difference"] < 2**-6


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"labels": 21}, "21 labels do not fit 20 queries; .*--labels to at most"),
    ({"vocab_size": 16}, "16 different labels .*--vocab_size of at least 17"),
  ],
)
def test_impossible_sizes(sizes, message):
  with pytest.raises(UserError, match=message):
    loss_head.HeadSizes(**sizes)


def test_command_writes_the_report(tmp_path):
  path = tmp_path / "report.json"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.benchmarks.loss_head"),
      *("--batch_size=2", "--num_queries=3", "--labels=2", "--vocab_size=50"),
      *("--width=4", "--chunk_size=16", "--rounds=2", f"--json={path}"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(path.read_text())
  assert report["benchmark"] == "loss_head"
  assert report["rounds"] == 2
  assert report["sizes"] == {
    **{"batch": 2, "num_queries": 3, "labels": 2, "width": 4},
    **{"vocab_size": 50, "chunk_size": 16, "dtype": "float32"},
  }
  assert report["results"]["plain"]["ratio"]["max"] == 1.0
  assert loss_head.format_report(report) == done.stdout.rstrip("\n")
