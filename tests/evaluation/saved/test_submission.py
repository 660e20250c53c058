"""`python -m narvl_jax.submission`: formats, ids, complete files."""

import json
import pathlib
import subprocess
import sys

import pytest

from narvl_jax.errors import UserError
from narvl_jax.submission import submission
from tests.evaluation.saved.predictions import prediction, store


def _store(run: pathlib.Path, predictions, **changes) -> pathlib.Path:
  names = [x["dataset"] for x in predictions]
  datasets = {name: {"examples": names.count(name)} for name in names}
  return store(run, predictions, **{"datasets": datasets, **changes})


_CAPTION = {"task": "caption", "prediction": "a dog", "dataset": "caption"}
_BOX = {"task": "grounding", "prediction": [10.0, 20.0, 40.5, 60.0]}


@pytest.mark.parametrize(
  ("form", "changes", "expected"),
  [
    ("vqa", {"id": "7"}, [{"question_id": 7, "answer": "red"}]),
    ("coco", _CAPTION, [{"image_id": 100, "caption": "a dog"}]),
    (
      "coco",
      {**_CAPTION, "id": "COCO_val2014_000000000042.jpg"},
      [{"image_id": 42, "caption": "a dog"}],
    ),
    (
      "refcoco",
      {**_BOX, "id": "31"},
      [{"sent_id": 31, "box": [10.0, 20.0, 30.5, 40.0]}],
    ),
    (
      "refcoco",
      {**_BOX, "id": "79_1"},
      [{"sent_id": "79_1", "box": [10.0, 20.0, 30.5, 40.0]}],
    ),
    (
      "aokvqa",
      {"id": "2Mb9"},
      {"2Mb9": {"multiple_choice": "", "direct_answer": "red"}},
    ),
  ],
)
def test_formats(tmp_path, form, changes, expected):
  file = _store(tmp_path / "run", [prediction(0, **changes)])
  submission(file, form=form, to=tmp_path / "out.json")
  assert json.loads((tmp_path / "out.json").read_text()) == expected


def test_the_command_writes_all_examples_in_order(tmp_path):
  rows = [prediction(i, prediction=f"answer {i}") for i in (2, 0, 1)]
  file = _store(tmp_path / "run", rows)
  command = [sys.executable, "-m", "narvl_jax.submission", str(file)]
  command += ["--format=vqa", f"--to={tmp_path}/out.json"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert '3 predictions of "vqa" in ' in done.stdout
  found = json.loads((tmp_path / "out.json").read_text())
  assert found == [
    {"question_id": 100 + i, "answer": f"answer {i}"} for i in range(3)
  ]
  for missing, message in (
    ("--format=vqa", "error: --to=FILE.json is missing: where to write\n"),
    ("--to=x.json", "error: --format is missing; one of coco, vqa, refcoco, "),
  ):
    done = subprocess.run(
      [*command[:4], missing], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_without_a_report_there_is_a_note(tmp_path, capsys):
  file = tmp_path / "some.jsonl"
  file.write_text(json.dumps(prediction()) + "\n")
  submission(file, form="vqa", to=tmp_path / "out.json")
  assert "note: there is no report" in capsys.readouterr().err


_THREE = [prediction(i) for i in range(3)]


@pytest.mark.parametrize(
  ("form", "rows", "report", "message"),
  [
    ("vqa", _THREE, {"max_examples": 3}, "at most 3 .*--max_examples=0"),
    (
      "vqa",
      _THREE,
      {"datasets": {"vqa": {"examples": 4}}},
      "has 3 predictions of .vqa., its report has 4 examples",
    ),
    ("vqa", [*_THREE, _THREE[1]], {}, "example 1 of .vqa. is there twice"),
    ("vqa", [_THREE[0], _THREE[2]], {}, "1 examples .* such as number 1"),
    (
      "vqa",
      _THREE,
      {"datasets": {"vqa": {"examples": 3, "records": 4}}},
      "1 examples .* such as number 3: their records are bad",
    ),
    (
      "vqa",
      [_THREE[0], prediction(1, id="100")],
      {},
      "1 ids are there more than once: 100$",
    ),
    (
      "coco",
      [prediction(i, **{**_CAPTION, "id": "5"}) for i in range(2)],
      {},
      "more than once: 5; a picture needs one caption",
    ),
    ("vqa", [prediction(id="v.jsonl:1")], {}, "needs the number of a question"),
    (
      "coco",
      [prediction(0, **{**_CAPTION, "id": "x"})],
      {},
      'picture .* id is "x"',
    ),
    ("coco", _THREE, {}, "needs predictions of caption; the file has vqa"),
    (
      "vqa",
      [prediction(), prediction(0, dataset="other")],
      {},
      "several data sets: vqa, other; choose one by --dataset=vqa",
    ),
  ],
)
def test_mistakes(tmp_path, form, rows, report, message):
  file = _store(tmp_path / "run", rows, **report)
  with pytest.raises(UserError, match=message):
    submission(file, form=form, to=tmp_path / "out.json")
  assert not (tmp_path / "out.json").exists()


def test_one_of_several_data_sets(tmp_path):
  rows = [prediction(), prediction(0, dataset="other", prediction="blue")]
  file = _store(tmp_path / "run", rows)
  out = tmp_path / "out.json"
  submission(file, form="vqa", to=out, dataset="other")
  assert json.loads(out.read_text())[0]["answer"] == "blue"
  with pytest.raises(UserError, match=r"not in the file\. Did you mean .other"):
    submission(file, form="vqa", to=out, dataset="othr")
