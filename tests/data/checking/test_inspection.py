"""Figures of a data set and the verdict on them."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.checking import inspection
from narvl_jax.data.checking import report as check_report
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import make_task
from narvl_jax.errors import UserError
from tests.data.number_source import ListSource, NumberSource, make_tasks

LIMITS = inspection.Limits(
  image_size=(6, 8), max_text_length=24, max_label_length=9, num_queries=4
)


@pytest.fixture(scope="module")
def model_tasks() -> dict[str, Any]:
  return make_tasks()


def _picture(width: int = 8, height: int = 6) -> np.ndarray:
  return np.zeros((height, width, 3), np.uint8)


def _grounding(boxes: list[Any], **fields: Any) -> ListSource:
  return ListSource(
    Record(f"g{i}", "grounding", _picture(), "what is one", {}, box, **fields)
    for i, box in enumerate(boxes)
  )


def _vqa(answers: list[str], prompt: str = "what is one") -> ListSource:
  return ListSource(
    Record(f"v{i}", "vqa", _picture(), prompt, {answer: 1.0})
    for i, answer in enumerate(answers)
  )


def _judge(
  source: Any, task: Any, limits: Any = LIMITS, **options: Any
) -> tuple[dict[str, Any], check_report.Verdict]:
  figures = inspection.inspect(source, task, limits, **options)
  verdict = check_report.judge(figures, task.name, eos=task.settings.eos)
  json.dumps(figures)
  return figures, verdict


@pytest.mark.parametrize("name", ["caption", "vqa", "grounding", "entailment"])
def test_good_data(model_tasks: dict[str, Any], name: str) -> None:
  limits = dataclasses.replace(LIMITS, num_queries=9)
  figures, verdict = _judge(NumberSource(name, 40), model_tasks[name], limits)
  assert verdict == (check_report.GOOD, [], [])
  assert (figures["records"], figures["read"]) == (40, 40)
  assert figures["bad"] == figures["infeasible"] == 0
  assert figures["with_target"] == 40
  assert sum(figures["lengths"]["text"].values()) == 40
  size = {"min": 8, "median": 8.0, "max": 8}
  assert figures["pictures"]["width"] == size
  if name == "grounding":
    share = (3 - 1) * (4 - 2) / 48
    assert figures["box_area"]["median"] == pytest.approx(share)


def test_bad_rows_are_named(model_tasks: dict[str, Any]) -> None:
  source = _vqa(["one"] * 40)
  source[2] = OSError("torn")
  source[5] = dataclasses.replace(source[5], image=b"no picture 12345")
  source[6] = dataclasses.replace(source[6], image=b"no picture 678")
  figures, verdict = _judge(source, model_tasks["vqa"])
  assert figures["bad"] == 3
  rows = figures["bad_rows"]
  assert [row["place"] for row in rows] == [
    f"list.tsv row {n}" for n in (3, 6, 7)
  ]
  assert [row["id"] for row in rows] == ["?", "v5", "v6"]
  assert rows[0]["error"] == "torn"
  # Messages that differ in numbers only are one reason.
  assert sorted(figures["reasons"].values()) == [1, 2]
  assert verdict.word == check_report.USABLE
  (flag,) = verdict.flags
  name, value = flag.split("=")
  assert name == "--config.data.max_bad_fraction"
  assert 3 / 40 < float(value) < 0.1
  limits = dataclasses.replace(LIMITS, max_bad_fraction=float(value))
  assert _judge(source, model_tasks["vqa"], limits)[1].word == check_report.GOOD


def test_pictures_are_decoded(model_tasks: dict[str, Any]) -> None:
  file = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
  Image.fromarray(noise).save(file, "JPEG")
  whole = file.getvalue()
  source = _vqa(["one"] * 2)
  source[0] = dataclasses.replace(source[0], image=whole)
  # Its header is sound.
  source[1] = dataclasses.replace(source[1], image=whole[:-300])
  figures, _ = _judge(source, model_tasks["vqa"])
  assert [row["id"] for row in figures["bad_rows"]] == ["v1"]
  assert "damaged or cut off" in figures["bad_rows"][0]["error"]
  assert figures["pictures"]["bytes"]["max"] == len(whole)


def test_infeasible_targets(model_tasks: dict[str, Any]) -> None:
  # Three equal words need a blank between each two.
  source = _vqa(["one"] * 5 + ["one two one two"] * 3 + ["one one one"] * 2)
  figures, verdict = _judge(source, model_tasks["vqa"])
  assert figures["lengths"]["labels"] == {"2": 5, "4": 2, "5": 3}
  assert figures["lengths"]["queries"] == {"2": 5, "5": 3, "6": 2}
  assert figures["infeasible"] == 5
  assert verdict.word == check_report.USABLE
  assert verdict.flags == ["--config.model.num_queries=6"]
  limits = dataclasses.replace(LIMITS, num_queries=6)
  assert not _judge(source, model_tasks["vqa"], limits)[1].flags


def test_one_query_may_come_from_eos(model_tasks: dict[str, Any]) -> None:
  _, verdict = _judge(_vqa(["one two one two"] * 3), model_tasks["vqa"])
  assert verdict.flags == ["--config.model.num_queries=5"]
  assert "--config.tasks.vqa.eos=False" in verdict.reasons[-1]


def test_one_long_target_in_thousands_needs_no_flag(
  model_tasks: dict[str, Any],
) -> None:
  source = _vqa(["one"] * 1999 + ["one two " * 5])
  figures, verdict = _judge(source, model_tasks["vqa"])
  assert figures["infeasible"] == figures["labels_too_long"] == 1
  assert verdict.word == check_report.GOOD


def test_texts_beyond_the_limits(model_tasks: dict[str, Any]) -> None:
  source = _vqa(["one two " * 6] * 4, prompt="one " * 30)
  limits = dataclasses.replace(LIMITS, num_queries=20, max_text_positions=26)
  figures, verdict = _judge(source, model_tasks["vqa"], limits)
  assert figures["text_too_long"] == figures["labels_too_long"] == 4
  (length,) = map(int, figures["lengths"]["text"])
  (labels,) = map(int, figures["lengths"]["labels"])
  assert verdict.flags == [
    f"--config.data.max_text_length={length}",
    f"--config.model.max_text_positions={length}",
    f"--config.data.max_label_length={labels}",
  ]


def test_word_limits_cut(model_tasks: dict[str, Any]) -> None:
  vocabulary = model_tasks["vqa"].vocabulary
  settings = {"max_source_words": 2, "max_target_words": 1}
  task = make_task("vqa", vocabulary, settings)
  figures, _ = _judge(_vqa(["one two", "one", "two"]), task)
  assert (figures["source_cut"], figures["target_cut"]) == (3, 1)
  text = check_report.format_figures("x", figures, settings)
  assert "cut by max_source_words=2: 3 of 3 (100.00%)" in text
  assert "cut by max_target_words=1: 1 of 3 (33.33%)" in text


def test_repeated_ids_are_named(model_tasks: dict[str, Any]) -> None:
  source = _vqa(["one"] * 10)
  source[0] = OSError("torn")  # Has no id.
  source[7] = dataclasses.replace(source[7], id="v2")
  figures, verdict = _judge(source, model_tasks["vqa"])
  assert figures["repeated_ids"] == {
    "ids": 1,
    "records": 2,
    "examples": [{"id": "v2", "places": ["list.tsv row 3", "list.tsv row 8"]}],
  }
  # They may be meant to.
  assert [flag.split("=")[0] for flag in verdict.flags] == [
    "--config.data.max_bad_fraction"
  ]


def test_boxes_of_width_and_height(model_tasks: dict[str, Any]) -> None:
  fault = UserError("the box ('3', '4', '2', '9') has no area; it must be")
  source = NumberSource("grounding", 40, {3: fault})
  _, verdict = _judge(source, model_tasks["grounding"])
  assert verdict.word == check_report.NOT_USABLE
  assert "are they x, y, width, height?" in verdict.reasons[0]


def test_boxes_of_fractions(model_tasks: dict[str, Any]) -> None:
  source = _grounding([(0.1, 0.2, 0.6, 0.9)] * 5)
  limits = dataclasses.replace(LIMITS, num_queries=9)
  _, verdict = _judge(source, model_tasks["grounding"], limits)
  assert verdict.word == check_report.NOT_USABLE
  assert "fractions" in verdict.reasons[0]
  assert "x0, y0, x1, y1" in verdict.reasons[0]


@pytest.mark.parametrize(
  ("source", "reason"),
  [
    (ListSource(), "there is no record"),
    (
      ListSource([ValueError("x")] * 3),
      "every record is bad; is it data for vqa?",
    ),
    (
      ListSource([*_vqa(["one"] * 7), *[ValueError("x")] * 3]),
      "30.00% of the records are bad: correct the data",
    ),
  ],
)
def test_not_usable(
  model_tasks: dict[str, Any], source: Any, reason: str
) -> None:
  _, verdict = _judge(source, model_tasks["vqa"])
  assert verdict == (check_report.NOT_USABLE, [reason], [])
  assert check_report.format_verdict(verdict).endswith(
    f"verdict: not usable: {reason}"
  )


def test_without_targets(model_tasks: dict[str, Any]) -> None:
  source = _vqa(["one"] * 4)
  for i in range(4):
    source[i] = dataclasses.replace(source[i], answers={})
  figures, verdict = _judge(source, model_tasks["vqa"])
  assert figures["bad"] == 0
  assert figures["without_target"] == 4
  assert verdict.word == check_report.GOOD
  assert "prediction only" in verdict.reasons[0]
  source[0] = _vqa(["one"])[0]
  assert "max_bad_fraction" in _judge(source, model_tasks["vqa"])[1].flags[0]


def test_how_answers_were_read(model_tasks: dict[str, Any]) -> None:
  source = _vqa(["one"] * 6)
  people = {"one": 0.9, "two": 0.6}
  right = {word: 1.0 for word in ("one", "two", "three")}
  for index, changes in enumerate(
    (
      {"answers": people, "annotators": 3},
      {"answers": people, "annotators": 10},
      {"answers": right},
      {"answers": people},
    )
  ):
    source[index] = dataclasses.replace(source[index], **changes)
  figures, _ = _judge(source, model_tasks["vqa"])
  assert figures["answers_read"] == {
    "annotators": {"3": 1, "10": 1},
    "several": {"3": 1},
    "scored": {"2": 1},
    "one": {"1": 2},
  }
  text = check_report.format_figures("x", figures, {})
  for part in (
    "        2 one answer",
    "        1 a list of right answers (no repeats), each with score 1",
    "        2 a list of annotators' answers (repeats), each with its VQA acc",
    "        1 answers with scores",
    "numbers of annotators: 3, 10",
    "note: 1 lists of 3 answers have no repeat, so each answer is right",
  ):
    assert part in text
  # One answer each needs no words.
  figures, _ = _judge(_vqa(["one"] * 3), model_tasks["vqa"])
  assert "read as" not in check_report.format_figures("x", figures, {})


def test_sampling(model_tasks: dict[str, Any]) -> None:
  task = model_tasks["vqa"]
  source = NumberSource("vqa", 1000)
  figures, _ = _judge(source, task, max_examples=10)
  assert figures["read"] == figures["pictures_read"] == 10
  assert sorted(set(source.reads)) == list(range(0, 1000, 100))
  figures, _ = _judge(source, task, max_examples=10, all_texts=True)
  assert (figures["read"], figures["pictures_read"]) == (1000, 10)
  assert sum(figures["lengths"]["text"].values()) == 1000
  assert figures["samples"] == list(range(0, 1000, 100))
  figures, _ = _judge(source, task, max_examples=0)
  assert figures["pictures_read"] == 1000


def test_threads_do_not_matter(model_tasks: dict[str, Any]) -> None:
  source = NumberSource("vqa", 300, {7: "image", 200: "prompt"})
  one, many = (
    _judge(source, model_tasks["vqa"], num_threads=n)[0] for n in (1, 4)
  )
  assert one == many
  assert one["bad"] == 2


def test_endless_sources_are_rejected(
  model_tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(inspection, "_MAX_READ", 30)
  source = NumberSource("vqa", 31)
  with pytest.raises(
    UserError, match=r"31 records are too many .*max_examples"
  ):
    _judge(source, model_tasks["vqa"], all_texts=True, max_examples=5)
  assert not source.reads


def test_histogram_marks_what_is_beyond_the_limit() -> None:
  lengths = {"2": 10, "19": 4, "21": 5, "30": 1}
  lines = check_report._histogram(lengths, 20, "num_queries=20")
  marked = [line.split()[0] for line in lines if "> num_queries" in line]
  assert marked == ["21-23", "30-32"]
  assert lines[-1] == "  limit: num_queries=20, longest: 30"
  counts = [int(line.split()[1]) for line in lines[:-1]]
  assert sum(counts) == 20
  (longest,) = (line for line in lines[:-1] if line.count("#") == 40)
  assert longest.split()[1] == "10"


def test_bins_of_a_histogram_start_at_0() -> None:
  """One gigantic text makes wide bins."""
  lines = check_report._histogram({"5": 9, "200000": 1}, 80, "x")
  assert [line.split()[0] for line in lines[:2]] == ["0-80", "81-16747"]


@pytest.mark.parametrize(
  ("lengths", "share", "expected"),
  [
    ({"2": 9, "7": 1}, 1.0, 7),
    ({"2": 9, "7": 1}, 0.9, 2),
    ({"10": 1, "9": 1}, 0.5, 9),
  ],
)
def test_fitting_limit(
  lengths: dict[str, int], share: float, expected: int
) -> None:
  assert check_report._fitting(lengths, share) == expected


def test_verdict_on_several_sources() -> None:
  few = check_report.Verdict(
    check_report.USABLE, ["x"], ["--config.model.num_queries=9"]
  )
  more = check_report.Verdict(
    check_report.USABLE,
    ["y"],
    ["--config.data.max_text_length=90", "--config.model.num_queries=12"],
  )
  good = check_report.Verdict(check_report.GOOD, [], [])
  bad = check_report.Verdict(check_report.NOT_USABLE, ["z"], [])
  merged = check_report.merge({"a": few, "b": more, "c": good})
  assert check_report.format_word("verdict on all", merged) == (
    "verdict on all: usable with these flags: --config.model.num_queries=12"
    " --config.data.max_text_length=90"
  )
  assert check_report.merge({"a": good, "b": good}).word == check_report.GOOD
  merged = check_report.merge({"a": bad, "b": good, "c": bad})
  assert check_report.format_word("all", merged) == "all: not usable: a, c"
