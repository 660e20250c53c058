"""`python -m narvl_jax.significance`: pairs, intervals, mistakes."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.evaluation.saved import paired
from narvl_jax.metrics import bootstrap
from narvl_jax.metrics.captions import simple_cider
from narvl_jax.significance import significance
from tests.evaluation.saved.predictions import prediction, store


def _scored(scores, **changes):
  return [
    prediction(i, score=float(x), **changes) for i, x in enumerate(scores)
  ]


def _damaged(**changes):
  return json.dumps(prediction() | changes)


def test_the_table_and_the_json(tmp_path):
  rng = np.random.default_rng(0)
  hard = rng.random(200)
  one, other = hard < 0.8, hard < 0.6
  store(tmp_path / "a", _scored(one))
  store(tmp_path / "b", _scored(other)[20:])
  command = [sys.executable, "-m", "narvl_jax.significance"]
  command += [str(tmp_path / "a"), str(tmp_path / "b")]
  done = subprocess.run(
    [*command, f"--json={tmp_path}/out.json"],
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads((tmp_path / "out.json").read_text())
  assert (found["common"], found["only_first"], found["only_second"]) == (
    *(180, 20),
    0,
  )
  entry = found["tasks"]["vqa"]["metrics"]["accuracy"]
  expected = bootstrap.paired_difference(
    bootstrap.with_counts(one[20:]),
    bootstrap.with_counts(other[20:]),
    range(180),
  )
  assert entry == {
    "first": pytest.approx(one[20:].mean()),
    "second": pytest.approx(other[20:].mean()),
    "difference": expected.value,
    "low": expected.low,
    "high": expected.high,
    "p_value": expected.p_value,
    "examples": 180,
  }
  assert 0 < entry["low"] < 0.2 < entry["high"] < 0.3
  assert "180 examples in both; 20 only in A, 0 only in B" in done.stdout
  assert "1,000 draws of examples" in done.stdout
  (row,) = [x for x in done.stdout.splitlines() if x.startswith("vqa")]
  assert f"{100 * entry['difference']:+.1f}" in row
  assert row.endswith("0.002")


def test_pictures_are_resampled_where_the_predictions_name_them():
  scores = np.random.default_rng(1).random((50, 2))
  images = [f"p{i // 5}" for i in range(50)]
  one, other = (
    [x | {"image": p} for x, p in zip(_scored(s), images, strict=True)]
    for s in scores.T
  )
  found = paired.compare(paired.match(one, other[::-1]))["vqa"]
  first, second = map(bootstrap.with_counts, scores.T)
  expected = bootstrap.paired_difference(first, second, images)
  assert found["images"] == 10
  assert found["metrics"]["accuracy"]["low"] == expected.low
  alone = paired.compare(paired.match(_scored(scores.T[0]), other))["vqa"]
  assert alone["images"] is None


def test_kinds_tasks_and_captions(tmp_path):
  def captions(texts):
    return [
      prediction(
        i,
        task="caption",
        dataset="caption",
        prediction=text,
        answers={"a red dog": 1.0, f"dog number {i}": 1.0},
        scores={"exact_match": 0.0},
      )
      for i, text in enumerate(texts)
    ]

  one = [*_scored([1, 1, 0], kind="count"), prediction(3, kind="colour")]
  other = [*_scored([1, 0, 0], kind="count"), prediction(3, kind="colour")]
  texts = [["a red dog", "a cat"], ["a dog", "dog number 1"]]
  a = store(tmp_path / "a", one + captions(texts[0]))
  b = store(tmp_path / "b", other + captions(texts[1]))
  found = significance(a, b, by=["kind"])["tasks"]
  kinds = found["vqa"]["kinds"]
  assert list(kinds) == ["colour", "count"]
  count = kinds["count"]["metrics"]["accuracy"]
  assert count["difference"] == pytest.approx(1 / 3)
  assert count["examples"] == 3
  references = [["a red dog", f"dog number {i}"] for i in range(2)]
  cider = found["caption"]["metrics"]["cider@simple"]
  for side, given in zip(("first", "second"), texts, strict=True):
    expected = simple_cider(given, references).value
    assert cider[side] == pytest.approx(expected)
  only = significance(a, b, task="vqa")["tasks"]
  assert list(only) == ["vqa"]


def test_question_types_and_sizes(tmp_path, capsys):
  one = _scored([1, 1, 0], question_type="is there", size="small")
  other = _scored([0, 1, 0], question_type="is there", size="small")
  for system in (one, other):
    system[2] |= {"question_type": "how many"}
  a, b = store(tmp_path / "a", one), store(tmp_path / "b", other)
  found = significance(a, b, by=["question_type", "size"])["tasks"]["vqa"]
  types = found["question_types"]
  assert {k: x["examples"] for k, x in types.items()} == {
    "how many": 1,
    "is there": 2,
  }
  difference = types["is there"]["metrics"]["accuracy"]["difference"]
  assert difference == pytest.approx(0.5)
  assert list(found["sizes"]) == ["small"]
  assert "kinds" not in found
  assert "\n  is there" in capsys.readouterr().out
  with pytest.raises(UserError, match=r'--by="kinds" is unknown.*"kind"'):
    significance(a, b, by=["kinds"])


def test_examples_without_scores(tmp_path, capsys):
  one, other = _scored([1, 1, 0]), _scored([0, 1, 1])
  for system in (one, other):
    system[0] |= {"scores": None, "answers": {}, "target": None}
  found = significance(store(tmp_path / "a", one), store(tmp_path / "b", other))
  assert found["tasks"]["vqa"]["metrics"]["accuracy"]["examples"] == 2
  a, b = (store(tmp_path / x, one[:1]) for x in "cd")
  assert significance(a, b)["tasks"]["vqa"]["metrics"] == {}
  assert "no scores" in capsys.readouterr().out


def test_the_newest_evaluations_that_belong_together(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  one = _scored([1, 0])
  store(a, one, time=1)
  store(a, one, time=2, step=9)
  store(a, one, time=3, decoding_name="beam")
  store(b, one, time=1, step=3)
  store(b, one, time=9, split="validation")
  file = store(b, one, time=2, decoding_name="candidates")

  def names(*given, **options):
    report = significance(*given, **options)
    return [pathlib.Path(report[x]).stem for x in ("first", "second")]

  assert names(a, b) == ["test-9-greedy", "test-3-greedy"]
  # Two decodings of one run, by their files.
  beam = a / "predictions" / "test-7-beam.jsonl"
  assert names(beam, a / "predictions" / "test-9-greedy.jsonl") == [
    *("test-7-beam", "test-9-greedy")
  ]
  with pytest.raises(UserError, match="share no split and decoding: test-7-b"):
    significance(a, file)
  with pytest.raises(UserError, match=r"no evaluation of --split=tst; it has"):
    significance(a, b, split="tst")
  with pytest.raises(UserError, match="are the same evaluation"):
    significance(file, file)
  other = b / "predictions" / "validation-7-greedy.jsonl"
  with pytest.raises(UserError, match=r'split "test" and .* of "validation"'):
    significance(beam, other)
  with pytest.raises(UserError, match=r"run python -m narvl_jax\.evaluate"):
    significance(a, tmp_path)


def test_the_evaluation_with_the_most_examples(tmp_path, capsys):
  a, b = tmp_path / "a", tmp_path / "b"
  for run in (a, b):
    store(run, _scored([1] * 9), time=1)
    store(run, _scored([1] * 4), time=2, max_examples=4)
  assert significance(a, b)["common"] == 9
  store(b, _scored([1] * 9), time=3, step=8)
  assert "B: " in capsys.readouterr().out
  assert significance(a, b)["second"].endswith("test-8-greedy.jsonl")
  # One run has two evaluations to compare.
  found = significance(a, a)
  assert found["first"] != found["second"]
  assert found["common"] == 4


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "has no predictions; give a file"),
    ("{", "line 1 is not JSON"),
    ("5", "line 1 is not a prediction .* lacks id, task, kind"),
    ("null", "line 1 is not a prediction .* lacks id, task, kind"),
    ('{"id": "1"}', "line 1 is not a prediction .* lacks task, kind"),
    ("[]", "line 1 is not a prediction"),
    (_damaged(id=["1"]), r"""line 1: "id" is \['1'\], not a text; repeat"""),
    (_damaged(scores={"accuracy": "1"}), '"scores" is .* object with numbers'),
    (_damaged(scores=[1.0]), '"scores" is .* not an object with numbers'),
    (_damaged(answers="red"), '"answers" is .* not an object with numbers'),
    (_damaged(index="5"), '"index" is .* not a whole number'),
    (_damaged(image=5), '"image" is 5, not a text'),
  ],
)
def test_damaged_files(tmp_path, content, message):
  good = store(tmp_path / "a", _scored([1]))
  bad = tmp_path / "bad.jsonl"
  bad.write_text(content)
  with pytest.raises(UserError, match=message):
    significance(good, bad)
  with pytest.raises(UserError, match="No such file"):
    significance(good, tmp_path / "none.jsonl")
  good.parent.parent.joinpath("evaluations/test-7-greedy.json").write_text("[]")
  with pytest.raises(UserError, match="is not a report of an evaluation"):
    significance(good, bad)


def test_examples_that_do_not_fit(tmp_path):
  one = _scored([1, 0])
  with pytest.raises(UserError, match=r"none of the 2 .* \(id \"100\"\)"):
    paired.match(one, [x | {"dataset": "other"} for x in one])
  with pytest.raises(
    UserError, match=r"truth of example 1 of \"vqa\".*differs"
  ):
    paired.match(one, [one[0], one[1] | {"answers": {"red": 0.5}}])
  with pytest.raises(UserError, match=r"1 predictions of the second .* twice"):
    paired.match(one, [*one, one[0]])
  path = store(tmp_path / "a", one)
  with pytest.raises(UserError, match="--level=95 must be between 0 and 1"):
    significance(path, path, level=95)
  other = store(tmp_path / "b", one)
  with pytest.raises(UserError, match=r'--task=vqq\. Did you mean "vqa"'):
    significance(path, other, task="vqq")
