"""The metrics of each task, and how examples of several hosts are combined."""

import dataclasses
import json

import numpy as np
import pytest

from narvl_jax.data.example import Record
from narvl_jax.evaluation import grounding, reporting
from narvl_jax.evaluation.caption import CaptionMatch, SimpleCider
from narvl_jax.evaluation.entailment import EntailmentAccuracy, EntailmentTable
from narvl_jax.evaluation.grounding import BoxOverlap
from narvl_jax.evaluation.metric import CHEAP, MeanMetric, Metric, Options
from narvl_jax.evaluation.metrics import METRICS, make_metrics, metric_names
from narvl_jax.evaluation.vqa import PeopleAccuracy, PopeSubsets, VqaAccuracy
from narvl_jax.metrics import bootstrap, captions
from narvl_jax.metrics.cider import DocumentFrequencies


def _record(task: str, **fields) -> Record:
  return Record("r0", task, np.zeros((8, 8, 3), np.uint8), **fields)


def _intervals(metric, pictures):
  """Returns name -> bounds of the interval."""
  found = bootstrap.intervals(metric.samples(pictures))
  return {name: (x.low, x.high) for name, x in found.items()}


@pytest.mark.parametrize(
  ("prediction", "exact", "f1"),
  [
    ("a red square", 1.0, 1.0),
    (" a  red\tsquare. ", 1.0, 1.0),
    ("A red square", 0.0, 4 / 6),
    ("a blue square", 0.0, 4 / 6),
    ("a red red square", 0.0, 6 / 7),
    ("", 0.0, 0.0),
    # The second reference is the nearer one.
    ("two things here", 0.0, 4 / 5),
  ],
)
def test_caption_uses_the_best_reference(prediction, exact, f1):
  record = _record("caption", answers={"a red, square.": 1, "two things": 1})
  scores = CaptionMatch().measure(record, prediction)
  assert scores == pytest.approx({"exact_match": exact, "token_f1": f1})


def test_caption_of_nothing_matches_nothing_only():
  record = _record("caption", answers={"...": 1.0})
  assert CaptionMatch().measure(record, "") == {
    "exact_match": 1.0,
    "token_f1": 1.0,
  }
  assert CaptionMatch().measure(record, "a") == {
    "exact_match": 0.0,
    "token_f1": 0.0,
  }


def test_vqa_looks_up_the_soft_score():
  record = _record("vqa", answers={"red": 1.0, "dark red": 0.3})
  assert VqaAccuracy().measure(record, "red") == {"accuracy": 1.0}
  assert VqaAccuracy().measure(record, " dark red ") == {"accuracy": 0.3}
  assert VqaAccuracy().measure(record, "blue") == {"accuracy": 0.0}


def test_entailment_is_right_or_wrong():
  record = _record("entailment", answers={"maybe": 1.0})
  assert EntailmentAccuracy().measure(record, "maybe") == {"accuracy": 1.0}
  assert EntailmentAccuracy().measure(record, "yes") == {"accuracy": 0.0}


@pytest.mark.parametrize(
  ("predicted", "target", "iou"),
  [
    ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
    ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
    ((0, 0, 10, 10), (2, 3, 7, 8), 0.25),
    # Touching, apart, empty and turned inside out.
    ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
    ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
    ((0, 0, 0, 0), (0, 0, 10, 10), 0.0),
    ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),
  ],
)
def test_iou_by_hand(predicted, target, iou):
  assert grounding.box_iou(predicted, target) == pytest.approx(iou, abs=1e-6)
  assert grounding.box_iou(target, predicted) == pytest.approx(iou, abs=1e-6)


def test_iou_matches_counted_pixels():
  rng = np.random.default_rng(0)
  for _ in range(50):
    masks = np.zeros((2, 40, 40), bool)
    boxes = []
    for mask in masks:
      x0, y0 = rng.integers(0, 30, 2)
      x1, y1 = rng.integers((x0 + 1, y0 + 1), 41)
      mask[y0:y1, x0:x1] = True
      boxes.append(tuple(map(float, (x0, y0, x1, y1))))
    expected = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    assert grounding.box_iou(*boxes) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("x1", "accuracy"), [(5.01, 1.0), (4.99, 0.0)])
def test_grounding_threshold_is_one_half(x1, accuracy):
  record = _record("grounding", box=(0.0, 0.0, 10.0, 10.0))
  scores = BoxOverlap().measure(record, (0.0, 0.0, x1, 10.0))
  assert scores is not None
  assert scores["acc@0.5"] == accuracy
  assert scores["mean_iou"] == pytest.approx(x1 / 10, abs=1e-6)


@pytest.mark.parametrize("side", [1.0, 3.0, 10.0, 16.0, 333.0, 4096.0])
@pytest.mark.parametrize("start", [0.0, 7.0])
def test_an_iou_of_exactly_one_half_counts(side, start):
  target = (start, start, start + side, start + side)
  half = (start, start, start + side / 2, start + side)
  record = _record("grounding", box=target)
  assert BoxOverlap().measure(record, half) == {
    "acc@0.5": 1.0,
    "acc@0.75": 0.0,
    "mean_iou": 0.5,
  }
  assert BoxOverlap().measure(record, target) == {
    "acc@0.5": 1.0,
    "acc@0.75": 1.0,
    "mean_iou": 1.0,
  }
  less = (start, start, start + side * 0.4999, start + side)
  scores = BoxOverlap().measure(record, less)
  assert scores is not None
  assert scores["acc@0.5"] == 0


@pytest.mark.parametrize(
  "box",
  [
    (3.0, 3.0, 3.0, 9.0),
    (5.0, 5.0, 5.0, 5.0),
    (9.0, 9.0, 1.0, 1.0),
    (1.0, 9.0, 9.0, 1.0),
    (0.0, 0.0, float("nan"), 10.0),
    (0.0, float("nan"), 10.0, 10.0),
    (float("-inf"), 0.0, float("inf"), 10.0),
    (-1e200, -1e200, 1e200, 1e200),
    (0.0, 0.0, 1e-200, 1e-200),
  ],
)
def test_iou_of_degenerate_boxes_is_zero(box):
  whole = (0.0, 0.0, 10.0, 10.0)
  for pair in ((box, whole), (whole, box), (box, box)):
    assert grounding.box_iou(*pair) == 0.0


def test_grounding_agrees_with_the_float32_of_the_reference():
  """The reference adds 1e-6, which float32 loses above 32 square pixels."""
  rng = np.random.default_rng(1)
  one = np.float32(1e-6)
  for _ in range(300):
    x0, y0 = rng.integers(0, 500, 2)
    # Even widths: halves are exact in float32, too.
    width, height = 2 * rng.integers(3, 100), rng.integers(6, 200)
    cut = rng.integers(1, width + 1)
    target = (float(x0), float(y0), float(x0 + width), float(y0 + height))
    box = (target[0], target[1], target[0] + float(cut), target[3])
    inter = np.float32(cut * height)
    reference = inter / (np.float32(width * height) + one)
    iou = grounding.box_iou(box, target)
    assert (iou >= 0.5) == (reference >= 0.5)
    assert iou == pytest.approx(reference, rel=1e-6)


def test_grounding_keeps_full_precision():
  # Half precision would round both edges to 1000.5 and call the box perfect.
  record = _record("grounding", box=(1000.0, 0.0, 1000.4, 1.0))
  scores = BoxOverlap().measure(record, (1000.0, 0.0, 1000.6, 1.0))
  assert scores is not None
  assert scores["mean_iou"] == pytest.approx(2 / 3, abs=1e-4)


@pytest.mark.parametrize(
  "metric", [CaptionMatch, VqaAccuracy, EntailmentAccuracy]
)
def test_unknown_truth_has_no_score(metric):
  assert metric().measure(_record("vqa"), "yes") is None


def test_unknown_box_has_no_score():
  assert (
    BoxOverlap().measure(_record("grounding"), (0.0, 0.0, 1.0, 1.0)) is None
  )


class LongestAnswer(Metric):
  """A metric of the corpus: words of the longest answer, and how many."""

  names = ("longest", "answers")

  def measure(self, example, prediction):
    return len(prediction.split()) if example.answers else None

  def reduce(self, measured):
    return {"longest": float(max(measured)), "answers": float(len(measured))}


class Share(MeanMetric):
  """A mean with values that no binary fraction represents."""

  names = ("share",)

  def measure(self, example, prediction):
    return {"share": 1 / len(prediction)}


def test_a_metric_of_the_whole_corpus():
  metric = LongestAnswer()
  assert metric.result() == {}
  known, unknown = _record("vqa", answers={"a": 1}), _record("vqa")
  for i, (example, text) in enumerate(
    [(known, "one"), (unknown, "one two three"), (known, "one two")]
  ):
    metric.update(example, text, i)
  assert metric.result() == {"longest": 2.0, "answers": 2.0}
  assert metric.result([0, 1]) == {"longest": 1.0, "answers": 1.0}
  assert metric.result([1]) == {}


def test_a_result_does_not_depend_on_the_number_of_hosts():
  """Not even by rounding: sums have the order of the examples."""
  example = _record("vqa")
  texts = ["x" * n for n in (3, 7, 11, 13, 17, 19, 23, 29, 31, 37)]
  whole = Share()
  for i, text in enumerate(texts):
    whole.update(example, text, i)
  hosts = [Share(), Share(), Share()]
  for i, text in enumerate(texts):
    hosts[i % 3].update(example, text, i)
  merged = Share()
  for host in reversed(hosts):
    merged.merge(host)
  assert merged.result() == whole.result()
  assert whole.result()["share"] == np.mean([1 / len(text) for text in texts])


def test_an_example_counts_once():
  one, other = Share(), Share()
  for metric in (one, other):
    metric.update(_record("vqa"), "abc", 4)
  with pytest.raises(ValueError, match=r"Share counts .* twice, .* number 4"):
    one.update(_record("vqa"), "abc", 4)
  with pytest.raises(ValueError, match=r"Share counts .* twice, .* number 4"):
    one.merge(other)


@pytest.mark.parametrize(
  ("width", "size"),
  [(31, "small"), (32, "medium"), (95, "medium"), (96, "large")],
)
def test_sizes_of_boxes_are_those_of_coco(width, size):
  assert grounding.size_of((1.0, 2.0, 1.0 + width, 2.0 + width)) == size


def test_simple_cider_is_that_of_all_captions():
  texts = [
    ("a red dog runs", {"A red dog runs.": 1.0, "a dog runs fast": 1.0}),
    ("a cat", {"two birds fly over a house": 1.0}),
  ]
  metric = SimpleCider()
  for i, (prediction, answers) in enumerate(texts):
    metric.update(_record("caption", answers=answers), prediction, i)
  metric.update(_record("caption"), "unknown", 2)
  expected = captions.simple_cider(
    [prediction for prediction, _ in texts], [[*x] for _, x in texts]
  )
  assert expected.value is not None
  assert expected.value > 1
  assert metric.result() == {"cider@simple": expected.value}
  ((low, high),) = _intervals(metric, {0: "a", 1: "b", 2: "c"}).values()
  assert low < expected.value < high
  # Of a group: its own documents.
  assert metric.result([2]) == {}


def test_equal_references_count_as_often_as_they_were_written():
  people = ("a dog", "a dog", "a cat")
  answers = {"a dog": 1.0, "a cat": 1.0}
  metric = SimpleCider()
  record = dataclasses.replace(
    _record("caption", answers=answers), people=people
  )
  metric.update(record, "a cat", 0)
  assert metric.measured[0] == ["a cat", [*people]]


def test_cider_uses_the_frequencies_of_its_tokenizer():
  def value(tokenizer: str) -> float:
    table = DocumentFrequencies(100, {"a": 90, "dog": 2}, tokenizer)
    metric = SimpleCider(Options(frequencies=table))
    metric.update(_record("caption", answers={"a dog": 1.0}), "a cat", 0)
    return metric.result()["cider@simple"]

  # The only document has every word: without a corpus no word counts.
  assert value("ptb") == 0
  assert value("simple") == value("") > 0


def test_unavailable_figures_have_a_reason_and_no_value(monkeypatch):
  figures = [
    captions.CaptionFigure("bleu_1", 0.5, statistics=np.ones((1, 2))),
    captions.CaptionFigure("spice", reason="no jar"),
  ]
  monkeypatch.setattr(captions, "coco_figures", lambda *_: figures)
  (*_, metric) = make_metrics("caption", Options("all"))
  metric.update(_record("caption", answers={"a": 1.0}), "a", 0)
  assert metric.result() == {"bleu_1": 0.5}
  assert metric.details([*metric.known().values()]) == {
    "unavailable": {"spice": "no jar"}
  }
  assert list(_intervals(metric, {0: "a"})) == ["bleu_1"]
  assert len(make_metrics("caption", CHEAP)) == len(METRICS["caption"])


@pytest.mark.parametrize(
  ("rule", "accuracy"), [("vqa_v2", 0.9), ("ok_vqa", 0.9), ("a_okvqa", 2 / 3)]
)
def test_vqa_accuracy_follows_the_rule_of_the_setting(rule, accuracy):
  people = ("Yes.", "yes", "yes", "no", *["maybe"] * 6)
  record = _record("vqa", answers={"yes": 0.3}, people=people)
  metric = PeopleAccuracy(Options(vqa_rule=rule))
  assert metric.measure(record, "yes") == {
    "vqa_accuracy": pytest.approx(accuracy)
  }
  assert metric.measure(_record("vqa", answers={"yes": 1.0}), "yes") is None


def test_pope_has_figures_of_each_subset():
  metric = PopeSubsets()
  rows = [
    ("random", "yes", "yes"),
    ("random", "no, there is not", "yes"),
    ("adversarial", "yes", "no"),
    ("colour", "yes", "no"),
    ("popular", "red", "red"),
  ]
  for i, (kind, prediction, truth) in enumerate(rows):
    record = _record("vqa", kind=kind, answers={truth: 1.0})
    metric.update(record, prediction, i)
  found = metric.details([*metric.known().values()])["pope"]
  assert list(found) == ["random", "adversarial"]
  assert found["random"] == {
    "examples": 2,
    "accuracy": 0.5,
    "precision": 1.0,
    "recall": 0.5,
    "f1": pytest.approx(2 / 3),
    "yes_ratio": 0.5,
  }
  # No question of the subset has the answer yes.
  assert found["adversarial"]["recall"] is None
  samples = metric.detail_samples({i: str(i) for i in range(5)})
  assert list(samples) == [("pope", "random"), ("pope", "adversarial")]
  values = bootstrap.intervals(samples["pope", "random"])
  assert {name: x.value for name, x in values.items()} == {
    name: found["random"][name] for name in reporting.POPE_FIGURES
  }
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_entailment_has_a_confusion_matrix():
  metric = EntailmentTable()
  pairs = [("yes", "yes"), ("no", "yes"), ("dunno", "maybe"), ("no", "no")]
  for i, (prediction, truth) in enumerate(pairs):
    metric.update(_record("entailment", answers={truth: 1}), prediction, i)
  table = metric.details([*metric.known().values()])["confusion"]
  assert table["classes"] == ["yes", "no", "maybe"]
  assert table["counts"] == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
  assert table["per_class"]["yes"] == {
    "precision": 1.0,
    "recall": 0.5,
    "f1": pytest.approx(2 / 3),
    "examples": 2,
  }
  assert table["per_class"]["maybe"]["precision"] is None
  samples = metric.detail_samples({i: str(i) for i in range(4)})
  values = bootstrap.intervals(samples["confusion", "per_class", "yes"])
  assert {name: x.value for name, x in values.items()} == {
    name: table["per_class"]["yes"][name]
    for name in ("precision", "recall", "f1")
  }


def test_intervals_draw_pictures_with_all_their_examples():
  metric = VqaAccuracy()
  for i in range(40):
    record = _record("vqa", answers={"a": 1.0} if i % 2 else {"b": 1.0})
    metric.update(record, "a", i)
  ((low, high),) = _intervals(metric, {i: str(i) for i in range(40)}).values()
  assert 0.25 < low < 0.5 < high < 0.75
  # Equal halves: pairs of examples of one picture never differ.
  paired = _intervals(metric, {i: str(i // 2) for i in range(40)})
  assert paired == {"accuracy": (0.5, 0.5)}


EXAMPLES = {
  "caption": (_record("caption", answers={"a red dog": 1.0}), "a dog"),
  "vqa": (
    _record("vqa", answers={"red": 0.3, "blue": 1.0}, people=("red",)),
    "red",
  ),
  "grounding": (_record("grounding", box=(0, 0, 3, 3)), (0.0, 0.0, 2.0, 3.0)),
  "entailment": (_record("entailment", answers={"no": 1.0}), "maybe"),
}


@pytest.mark.parametrize("task", METRICS)
def test_every_metric_keeps_to_the_interface(task):
  """Names are those of the result; what is measured survives JSON."""
  example, prediction = EXAMPLES[task]
  found = {}
  for make in METRICS[task]:
    metric = make()
    metric.update(example, prediction, 0)
    measured = metric.measured[0]
    assert json.loads(json.dumps(measured)) == measured
    found |= metric.result()
  assert list(found) == metric_names(task)
  assert all(isinstance(value, float) for value in found.values())
