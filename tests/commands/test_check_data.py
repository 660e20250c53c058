"""check_data: what it opens, its samples, and the command."""

import base64
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

from narvl_jax import check_data as command
from narvl_jax.configs.common import evaluation_source, train_source
from narvl_jax.data.checking import report as check_report
from narvl_jax.data.checking import samples as check_samples
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import vocabulary_texts
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import data_check
from narvl_jax.experiment.config import default_config
from tests.data.number_source import ListSource, make_tasks


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def test_samples_show_the_box_of_data_and_target(
  model_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
  panels: list[Any] = []
  drawn = check_samples.rendering.prediction_grid

  def spy(cells: Any, **options: Any) -> Image.Image:
    panels.extend(cells)
    return drawn(cells, **options)

  monkeypatch.setattr(check_samples.rendering, "prediction_grid", spy)
  task = model_tasks["grounding"]
  box = (100.0, 200.0, 700.0, 500.0)
  record = Record(
    "g", "grounding", np.zeros((600, 1000, 3), np.uint8), "one", {}, box
  )
  picture = check_samples.draw_samples(
    "name", ListSource([record] * 12), task, range(12), (6, 8)
  )
  assert picture is not None
  assert len(panels) == 5
  panel = panels[0]
  # 1000 pixels are shown as 512.
  assert panel.image.shape == (307, 512, 3)
  np.testing.assert_allclose(
    panel.target_box, np.multiply(box, 0.512), rtol=2e-3
  )
  # 16 bins: half of one is 33 and 20 pixels.
  difference = np.abs(np.subtract(panel.predicted_box, panel.target_box))
  assert difference.max() <= 34 * 0.512
  assert panel.target == "100.0, 200.0, 700.0, 500.0"
  assert 'the text " one "' in panel.prompt


def _tsv(path: pathlib.Path, rows: int = 30, bad: int = -1) -> pathlib.Path:
  file = io.BytesIO()
  Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(file, "JPEG")
  data = base64.b64encode(file.getvalue()).decode()
  lines = [
    f"{i}\t{i}\twhat is {i}?\t{'bad' if i == bad else '1.0|!+two words'}\t"
    f"dog\t{data}\n"
    for i in range(rows)
  ]
  path.write_text("".join(lines))
  return path


def _command(*arguments: str, cwd: Any) -> Any:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.check_data", *arguments],
    capture_output=True,
    text=True,
    check=False,
    cwd=cwd,
  )


def test_command(tmp_path: pathlib.Path) -> None:
  path = _tsv(tmp_path / "vqa_train.tsv", bad=4)
  done = _command(
    *(str(path), "--task=vqa", "--num_queries=2", "--json=figures.json"),
    cwd=tmp_path,
  )
  assert done.returncode == 0, done.stderr
  assert f'{path} row 5 (id "?"): the answer' in done.stdout
  assert "picture width  min 20, median 20, max 20 pixels" in done.stdout
  last = done.stdout.splitlines()[-1]
  assert last.startswith("verdict: usable with these flags: --config.model.")
  assert "--config.model.num_queries=3" in last
  report = json.loads((tmp_path / "figures.json").read_text())["vqa_train"]
  assert report["infeasible"] == 29
  assert report["bad"] == 1
  assert report["verdict"]["word"] == check_report.USABLE
  with Image.open(tmp_path / "data_check.png") as picture:
    assert picture.width > 1000
  assert not list(tmp_path.glob("*.part"))


def test_command_reports_not_usable(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "rows.tsv"
  path.write_text("1\t2\n" * 3)
  done = _command(str(path), "--task=vqa", "--png=", cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: ")
  lines = _tsv(tmp_path / "good.tsv", 3).read_text().splitlines()
  bad = [line.replace("1.0|!+", "") for line in lines]
  path.write_text("\n".join([lines[0], *bad]))
  done = _command(str(path), "--task=vqa", "--png=", cwd=tmp_path)
  assert done.returncode == 2, done.stderr
  assert done.stdout.splitlines()[-1] == (
    "verdict: not usable: 75.00% of the records are bad: correct the data"
  )
  assert "no newline" in done.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), r"nothing to check: name a source, or set --config=FILE"),
    (("shapes", "--task=vqa", "--png=no/x.png"), r'--png="no/x.png": there is'),
    (("shapes", "--task=vqa", "--json=."), r'--json="\." is a folder'),
    (
      ("shapes", "--task=vqa", "--vocabulary=."),
      r'"\." has no vocabulary: neither dict\.txt .*set --vocabulary',
    ),
  ],
)
def test_mistakes_in_the_command(
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  arguments: tuple[str, ...],
  message: str,
) -> None:
  monkeypatch.chdir(tmp_path)
  values: dict[str, Any] = dict.fromkeys(
    ("config", "num_queries", "exif_orientation")
  )
  values |= dict.fromkeys(("task", "split", "vocabulary", "png", "json"), "")
  spec = [a for a in arguments if not a.startswith("--")]
  for argument in arguments:
    if argument.startswith("--"):
      key, _, value = argument[2:].partition("=")
      values[key] = value
  flags = _Flags(values)
  monkeypatch.setattr(command.flags, "FLAGS", flags)
  with pytest.raises(UserError, match=message):
    command.main(["check", *spec])
  assert not list(tmp_path.iterdir())


class _Flags(dict):
  """Stands in for absl's, which are global."""

  def __getitem__(self, key: str) -> Any:
    return _Flag(super().__getitem__(key))

  def __getattr__(self, key: str) -> Any:
    return super().__getitem__(key)


@dataclasses.dataclass
class _Flag:
  value: Any


def _config() -> Any:
  config = default_config("vqa", "grounding")
  options: dict[str, Any] = {"image_size": 48}
  config.data.train.quiz = train_source("shapes", "vqa", **options)
  config.data.train.boxes = train_source("shapes", "grounding", **options)
  config.data.evaluation.quiz = evaluation_source("shapes", "vqa", **options)
  return config


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("", ["train.boxes", "train.quiz", "evaluation.quiz"]),
    ("quiz", ["train.quiz", "evaluation.quiz"]),
    ("evaluation.quiz", ["evaluation.quiz"]),
    ("boxes", ["train.boxes"]),
  ],
)
def test_entries_of_a_config(name: str, expected: list[str]) -> None:
  entries = data_check.open_entries(_config(), name, "")
  assert [entry.name for entry in entries] == expected
  tasks = {"quiz": "vqa", "boxes": "grounding"}
  for entry in entries:
    assert entry.task == tasks[entry.name.split(".")[1]]
    # The test split of the procedural source is small.
    assert (len(entry.source) < 10**6) == entry.name.startswith("evaluation")


def test_unknown_entry() -> None:
  with pytest.raises(UserError, match=r'no data "train.qiz".*"train.quiz"'):
    data_check.open_entries(_config(), "train.qiz", "")


def test_limits_are_those_of_the_config() -> None:
  config = _config()
  config.data.max_text_length = 33
  config.model.num_queries = 11
  (entry,) = data_check.open_entries(config, "boxes", "")
  texts = vocabulary_texts("grounding", {}, [entry.source[i] for i in range(9)])
  vocabulary = Vocabulary.train(texts, 400, num_bins=64)
  figures, _, _ = data_check.check(entry, vocabulary, max_examples=5)
  limits = figures["limits"]
  assert (limits["max_text_length"], limits["num_queries"]) == (33, 11)
  figures, _, _ = data_check.check(
    entry, vocabulary, max_examples=5, num_queries=4
  )
  assert figures["limits"]["num_queries"] == 4
  assert figures["infeasible"] == 5


def test_vocabularies(tmp_path: pathlib.Path) -> None:
  entry = data_check.open_spec("shapes", "vqa", "")
  entry = dataclasses.replace(entry, source=[entry.source[i] for i in range(9)])
  learnt, how = data_check.find_vocabulary("", None, [entry])
  assert "learned from these texts" in how
  assert learnt.unk_id not in learnt.encode(" what color")
  learnt.save(tmp_path)
  loaded, how = data_check.find_vocabulary(str(tmp_path), None, [entry])
  assert how == str(tmp_path)
  assert loaded.fingerprint == learnt.fingerprint


def test_official_vocabulary(shared_files: pathlib.Path) -> None:
  folder = shared_files / "bpe"
  vocabulary, _ = data_check.find_vocabulary(str(folder), None, [])
  assert vocabulary.size == 59458
