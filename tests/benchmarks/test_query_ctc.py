"""The benchmark of the loss at tiny sizes: its report, not its times."""

import json
import subprocess
import sys

import numpy as np
import pytest

from narvl_jax.benchmarks import query_ctc, timing
from narvl_jax.command_line.json_output import check_json_path
from narvl_jax.errors import UserError

TINY = query_ctc.LossSizes(
  batch=2, num_queries=6, labels=4, vocab_size=5000, dtype="float32"
)


@pytest.fixture(scope="module")
def report():
  return query_ctc.benchmark(TINY, rounds=2)


def test_losses_and_gradients_are_the_same(report):
  assert {"query_ctc_loss", "optax.ctc_loss"} <= set(report["results"])
  for result in report["results"].values():
    assert result["loss_difference"] < 1e-5
    assert result["gradient_difference"] < 1e-4


def test_memory_is_that_of_the_gradient_alone(report):
  size = report["logits_bytes"]
  assert size == 2 * 6 * 5000 * 4
  ours = report["results"]["query_ctc_loss"]
  assert size <= ours["output_bytes"] < 1.1 * size
  plain = report["results"]["optax.ctc_loss"]
  assert ours["temp_bytes"] < 0.5 * size < plain["temp_bytes"]


def test_table_names_what_was_measured(report):
  text = query_ctc.format_report(report)
  assert "batch=2 num_queries=6 labels=4 vocab_size=5000" in text
  heading, line, *rows = text.splitlines()[4:]
  columns = ("ms, median (min..max)", "ratio", "temp MB", "out MB", "grad diff")
  assert all(column in heading for column in columns)
  assert set(line) == {"-"}
  assert len(rows) == len(report["results"])


def test_half_precision():
  sizes = query_ctc.LossSizes(2, 3, 2, 50, "bfloat16")
  results = query_ctc.benchmark(sizes, rounds=1)["results"]
  assert results["optax.ctc_loss"]["loss_difference"] < 1e-2


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((2, 3, 4, 50), "4 labels do not fit 3 queries; .*--labels to at most 3"),
    ((2, 9, 8, 8), "8 different labels .*--vocab_size of at least 9, not 8"),
  ],
)
def test_impossible_sizes(sizes, message):
  with pytest.raises(UserError, match=message):
    query_ctc.LossSizes(*sizes)


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.benchmarks.query_ctc", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command_writes_the_report(tmp_path):
  path = tmp_path / "report.json"
  done = run(
    *("--batch_size=2", "--num_queries=3", "--labels=2", "--vocab_size=50"),
    *("--rounds=2", f"--json={path}"),
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(path.read_text())
  assert report["benchmark"] == "query_ctc"
  assert report["rounds"] == 2
  assert report["sizes"] == {
    "batch": 2,
    "num_queries": 3,
    "labels": 2,
    "vocab_size": 50,
    "dtype": "float32",
  }
  assert {"jax", "optax", "device", "cpus"} <= set(report["environment"])
  for result in report["results"].values():
    for key in ("milliseconds", "ratio"):
      assert list(result[key]) == ["median", "min", "max"]
      assert result[key]["min"] <= result[key]["median"] <= result[key]["max"]
  assert report["results"]["query_ctc_loss"]["ratio"]["max"] == 1.0
  assert query_ctc.format_report(report) == done.stdout.rstrip("\n")
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--labels=21"], "21 labels do not fit 20 queries"),
    (["--bach=2"], 'unknown flag "--bach". Did you mean "--batch_size'),
    (["--batch_size=0"], '--batch_size="0"'),
    (["--dtype=int8"], '--dtype="int8"'),
    (["--json=missing/report.json"], 'there is no folder "missing"'),
  ],
)
def test_mistakes_are_one_line(arguments, message):
  done = run(*arguments)
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr.startswith("error: ")
  assert done.stderr.count("\n") == 1
  assert message in done.stderr


def test_json_path_must_be_a_file(tmp_path):
  with pytest.raises(UserError, match=r'--json=".*" is a folder; give'):
    check_json_path(str(tmp_path))


def test_rounds_interleave_the_candidates():
  order = []
  timings = timing.measure(
    {name: (lambda name=name: order.append(name)) for name in "ab"},
    rounds=2,
    calls=2,
  )
  # A first run of each, then a warm-up and two measured calls per round.
  assert "".join(order) == "ab" + "aaabbb" + "bbbaaa"
  assert all(t.seconds.shape == (2,) for t in timings.values())


def test_spread():
  values = timing.spread(np.array([3.0, 1.0, 2.0]))
  assert values == {"median": 2.0, "min": 1.0, "max": 3.0}
  assert timing.format_spread(values) == "2.0 (1.0..3.0)"
