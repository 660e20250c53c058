"""The benchmark of reading at tiny sizes: its report, not its times."""

import contextlib
import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.benchmarks import data, data_files, data_load, data_startup
from narvl_jax.data.pictures.images import prepare_image
from tests.stores.servers import Store

ROWS, WIDTH, HEIGHT = 12, 40, 30


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("data")
  return data_load.make_tsv(folder, ROWS, WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def load(path: pathlib.Path) -> data_load.Load:
  return data_load.tsv_load(path, image_size=(24, 16), batch_size=4)


def test_file_is_like_the_published_ones(path: pathlib.Path) -> None:
  source = data_load.open_tsv(path)
  assert len(source) == ROWS
  record = source[5]
  assert prepare_image(record.image, (HEIGHT, WIDTH)).std() > 20
  assert len(record.answers) == 2
  assert len(record.objects or ()) == 12
  assert record.prompt.startswith("what color is the")
  # It is not written twice.
  before = path.stat().st_mtime_ns
  assert data_load.make_tsv(path.parent, ROWS, WIDTH, HEIGHT) == path
  assert path.stat().st_mtime_ns == before


def test_photo_has_the_size_of_a_photo() -> None:
  photo = data_files.photo(3, 640, 480)
  assert photo == data_files.photo(3, 640, 480)
  assert photo != data_files.photo(4, 640, 480)
  with Image.open(io.BytesIO(photo)) as picture:
    assert (picture.format, picture.size) == ("JPEG", (640, 480))
  assert 50_000 < len(photo) < 120_000


def test_every_candidate_reads_pictures(load: data_load.Load) -> None:
  report = data.benchmark(load, rows=ROWS, rounds=1, workers=[0])
  results = report["results"]
  assert list(results) == ["bare Pillow", "end to end, 0 workers"]
  assert results["bare Pillow"]["ratio"]["median"] == 1
  for result in results.values():
    assert result["cpu_ms"]["min"] > 0
    # Of one round, as the median of rates is not the rate of the median.
    rate = 1e3 / result["cpu_ms"]["median"]
    assert result["per_core"]["median"] == pytest.approx(rate)
  text = data.format_report(report)
  assert "rows=12 image_size=24x16 batch=4" in text
  assert "pictures/s/core" in text
  json.dumps(report)


def test_sample_is_spread_over_the_source(load: data_load.Load) -> None:
  sample = load.sample(ROWS)
  assert [index for _, index, _ in sample] == list(range(ROWS))
  assert data._bare(load, sample)() == ROWS


def test_work_ahead_is_counted_in_the_turn_that_caused_it() -> None:
  taken = data._take(iter(range(100)), rows=10, batch_size=4, ahead=6)
  assert taken == 24 * 4
  assert data._take(iter(range(100)), rows=10, batch_size=4, ahead=0) == 12


def test_first_batch_in_a_fresh_process(
  load: data_load.Load, path: pathlib.Path
) -> None:
  report = data_startup.first_batch(load, path, rounds=1)
  assert report["records"] == ROWS
  seconds = report["seconds"]
  assert set(seconds) == {"open the source", "first batch of 4", "both"}
  assert seconds["both"]["median"] == pytest.approx(
    seconds["open the source"]["median"] + seconds["first batch of 4"]["median"]
  )
  assert report["index"]["file_gb"] == path.stat().st_size / 1e9
  assert report["index"]["build the index"]["median"] > 0
  assert not (path.parent / "index_timing").exists()
  text = data_startup.format_first_batch(report)
  assert "first batch: records=12" in text
  assert "read alone" in text


def test_memory_with_and_without_workers(load: data_load.Load) -> None:
  report = data_startup.memory(load, [0, 1], examples=48)
  none, one = report["results"]["0"], report["results"]["1"]
  assert none[-1]["examples"] == one[-1]["examples"] == 48
  assert all(row["own"] > 10**7 for row in none + one)
  assert all(row["workers"] == 0 for row in none)
  assert all(row["workers"] > 10**7 for row in one)
  text = data_startup.format_memory(report)
  assert "memory with 1 workers" in text
  assert "+0.0" in text


def test_store_against_local(
  load: data_load.Load,
  path: pathlib.Path,
  gcs: Store,
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  report = data_startup.against_store(
    path, gcs.make_bucket(), load, rows=4, rounds=1, threads=[2]
  )
  local = report["results"]["local, 2 threads"]
  assert local["ratio"]["median"] == 1
  assert "store, 2 threads" in data_startup.format_store(report)
  assert any(f"{path.name}?" in x for x in gcs.faults.requests)


def test_cpu_time_of_workers_counts(load: data_load.Load) -> None:
  with contextlib.closing(load.batches(1, threads=1, prefetch=1)) as batches:
    batch = next(batches)
    assert batch["image"].shape == (4, 24, 16, 3)
    own, before = data_startup.time.process_time(), data_load.cpu_seconds()
    # A worker has spent its imports by now.
    assert before - own > 0.1
  assert np.isfinite(before)


def test_arrays_and_configs() -> None:
  from narvl_jax.configs import shapes

  config: Any = shapes.get_config("quick")
  config.train.batch_size = 4
  load = data_load.config_load(config)
  load = dataclasses.replace(load, entries=load.entries[:2])
  report = data.benchmark(load, rows=6, rounds=1, workers=[0])
  assert report["sizes"]["image_size"] == "48x48"
  assert report["sizes"]["rows"] == 6


def run(*arguments: str) -> Any:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.benchmarks.data", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command_writes_the_report(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "report.json"
  done = run(
    *("--rows=8", "--batch_size=4", "--rounds=1", "--num_workers=0,1"),
    *("--width=32", "--height=24", "--image_size=16", f"--json={path}"),
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(path.read_text())
  assert report["results"]["end to end, 1 workers"]["cpu_ms"]["median"] > 0
  assert "end to end, 1 workers" in done.stdout


def test_wrong_workers(tmp_path: pathlib.Path) -> None:
  done = run("--num_workers=two")
  assert done.returncode == 2
  assert done.stderr.splitlines() == [
    "error: --num_workers=['two'] must be numbers, such as 0,2"
  ]
