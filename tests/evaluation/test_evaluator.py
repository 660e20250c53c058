"""Evaluation of whole data sets: what is asked, in which order, the report."""

import collections
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax import parallel
from narvl_jax.data.example import TASKS, Record
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError
from narvl_jax.evaluation import evaluator
from narvl_jax.evaluation import tally as tally_lib
from narvl_jax.evaluation.metric import Options
from narvl_jax.evaluation.tally import Tally
from narvl_jax.experiment import datasets
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.prediction.predictor import Answer, Predictor
from narvl_jax.terminal import progress
from narvl_jax.terminal.activity import Activity
from tests.evaluation import tiny_run

QUERIES = 8


class Oracle(nn.Module):
  """Emits the ids in the first row of the picture."""

  vocab_size: int
  scale: float = 30.0

  def encode(self, image, text, *, image_mask):
    del text, image_mask
    ids = image[:, 0, :QUERIES, 0].astype(jnp.int32)
    return self.scale * jax.nn.one_hot(ids, self.vocab_size)

  def decode(self, encoded):
    return encoded


def _oracle(scale: float = 30.0, **data: Any) -> Any:
  """Returns an experiment that answers the ids in the pictures."""
  experiment, _ = tiny_run.tiny_model()
  config: Any = experiment.config.copy_and_resolve_references()
  config.data.update(data)
  model = Oracle(experiment.vocabulary.size, scale)
  # Opens its data sets again: `serve` replaces them.
  return dataclasses.replace(
    experiment, config=config, model=model, datasets=None
  )


def _identity() -> dict[str, Any]:
  """Returns the variables of the oracle: states are logits."""
  size = tiny_run.tiny_model()[0].vocabulary.size
  return {"params": {"embed_tokens": np.eye(size, dtype=np.float32)}}


def _picture(ids: list[int]) -> np.ndarray:
  vocabulary = tiny_run.tiny_model()[0].vocabulary
  path = ids + [vocabulary.blank_id] * (QUERIES - len(ids))
  image = np.zeros((32, 32, 3), np.uint8)
  image[0, :QUERIES, 0] = path
  return image


def _record(task: str, said: str | list[int], number: int, **fields) -> Record:
  vocabulary = tiny_run.tiny_model()[0].vocabulary
  ids = vocabulary.encode(" " + said) if isinstance(said, str) else said
  prompt = fields.pop("prompt", "what color is it?")
  return Record(f"{task}{number}", task, _picture(ids), prompt, **fields)


@pytest.fixture
def serve(monkeypatch):
  """Makes every data set of a task consist of the given records."""

  def serve(records: list[Record]) -> list[tuple[str, str]]:
    asked = []

    def load_source(name, *, task, split, **options):
      del options
      asked.append((name, split))
      return [record for record in records if record.task == task]

    monkeypatch.setattr(datasets, "load_source", load_source)
    return asked

  return serve


def _bins(*numbers: int) -> list[int]:
  start = tiny_run.tiny_model()[0].vocabulary.bin_start
  return [start + number for number in numbers]


def _known_records() -> list[Record]:
  """Five questions, two of every other task, with known scores."""
  said = ["red", "blue", "red", "red", "2"]
  truth = [{"red": 1.0}, {"blue": 0.3}, {"blue": 1.0}, {"red": 1.0}, {}]
  kinds = ["color", "color", "count", "", "count"]
  records = [
    _record("vqa", s, i, answers=t, kind=k)
    for i, (s, t, k) in enumerate(zip(said, truth, kinds, strict=True))
  ]
  red = tiny_run.tiny_model()[0].vocabulary.encode(" red")
  return [
    *records,
    # Repeats are one word in a caption.
    _record("caption", red + red, 0, answers={"red": 1.0}),
    _record("caption", "red circle", 1, answers={"blue circle": 1.0}),
    _record("entailment", "yes", 0, answers={"yes": 1.0}),
    _record("entailment", "maybe", 1, answers={"no": 1.0}),
    # Equal bins are two coordinates; 16 bins are 32 / 15 pixels apart.
    _record("grounding", _bins(0, 0, 15, 15), 0, box=(0.0, 0.0, 32.0, 32.0)),
    _record("grounding", _bins(0, 0, 15), 1, box=(0.0, 0.0, 32.0, 32.0)),
  ]


def test_misfits_are_reported_before_any_answer(serve):
  asked = serve(_known_records())
  with pytest.raises(UserError, match=r"no list of the answers.*--answers=ans"):
    evaluator.evaluate_tasks(
      _oracle(),
      _identity(),
      split="test",
      batch_size=2,
      decodings={"vqa": Decoding(constrained=True)},
    )
  assert asked == []
  with pytest.raises(UserError, match=r'no task "vqq"\. Did you mean "vqa"'):
    Predictor(_oracle(), _identity(), {"vqq": Decoding("beam")})
  predictor = Predictor(_oracle(), _identity())
  with pytest.raises(UserError, match=r'no task "vqq"\. Did you mean "vqa"'):
    next(predictor.answers(_known_records(), "vqq", batch_size=2))
  with pytest.raises(UserError, match=r'no task "boxes"'):
    predictor.answer(dataclasses.replace(_known_records()[0], task="boxes"))
  for wrong in ({"vqa": {"method": "beam"}}, Decoding("beam")):
    decodings: Any = wrong
    with pytest.raises(UserError, match=r"must have a Decoding for each task"):
      Predictor(_oracle(), _identity(), decodings)


@pytest.mark.parametrize("batch_size", [2, 16])
def test_report_of_known_answers(serve, batch_size):
  asked = serve(_known_records())
  report, predictions = evaluator.evaluate_tasks(
    _oracle(), _identity(), split="held_out", batch_size=batch_size, step=3
  )
  assert asked == [("shapes", "held_out")] * 4
  tasks = report.pop("tasks")
  assert list(tasks["caption"]) == ["exact_match", "token_f1", "cider@simple"]
  assert list(tasks["grounding"]) == ["acc@0.5", "acc@0.75", "mean_iou"]
  assert 0 < tasks["caption"].pop("cider@simple") < 10
  assert tasks["caption"] == {"exact_match": 0.5, "token_f1": 0.75}
  assert tasks["vqa"] == pytest.approx({"accuracy": 2.3 / 4})
  assert tasks["entailment"] == {"accuracy": 0.5}
  assert tasks["grounding"] == pytest.approx(
    {"acc@0.5": 0.5, "acc@0.75": 0.5, "mean_iou": 0.5}
  )
  assert report.pop("counts") == {
    "caption": 2,
    "entailment": 2,
    "grounding": 2,
    "vqa": 5,
  }
  assert report.pop("kinds")["vqa"] == {
    "color": {"accuracy": pytest.approx(0.65), "examples": 2},
    "count": {"accuracy": 0.0, "examples": 2},
  }
  assert report.pop("datasets")["entailment"] == {
    "task": "entailment",
    "examples": 2,
    "records": 2,
    "accuracy": 0.5,
  }
  assert not any(report.pop("question_types").values())
  sizes = {task: list(x) for task, x in report.pop("sizes").items() if x}
  assert sizes == {"grounding": ["medium"]}
  counts = report.pop("confusion")["entailment"]["counts"]
  assert counts == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
  assert report.pop("pope", {}) == {}
  assert report.pop("decoding").keys() == tasks.keys()
  assert report == {
    "split": "held_out",
    "step": 3,
    "examples": 11,
    "decoding_name": "greedy",
    "max_examples": None,
    "only_tasks": None,
  }

  found = [p for p in predictions if p["task"] == "vqa"]
  assert [p["prediction"] for p in found] == ["red", "blue", "red", "red", "2"]
  assert [p["correct"] for p in found] == [True, False, False, True, None]
  assert [p["target"] for p in found] == ["red", "blue", "blue", "red", None]
  assert [p["index"] for p in found] == [0, 1, 2, 3, 4]
  assert all(p["probability"] > 0.99 for p in predictions)


def test_bad_records_are_left_out_and_the_rest_keeps_its_place(serve):
  records = [
    _record("vqa", "red", i, answers={"red": 1.0}, kind=str(i))
    for i in range(12)
  ]
  records[5] = dataclasses.replace(records[5], image=b"no picture")
  serve(records + _known_records()[5:])
  _, predictions = evaluator.evaluate_tasks(
    _oracle(max_bad_fraction=0.2), _identity(), split="test", batch_size=4
  )
  found = [(p["index"], p["kind"]) for p in predictions if p["task"] == "vqa"]
  assert found == [(i, str(i)) for i in range(12) if i != 5]


def test_too_many_bad_records_stop_the_evaluation(serve):
  records = _known_records()
  records[0] = dataclasses.replace(records[0], prompt="")
  serve(records)
  with pytest.raises(UserError, match=r"1 of 5 records of vqa are bad"):
    evaluator.evaluate_tasks(_oracle(), _identity(), split="test", batch_size=4)


def test_examples_are_spread_over_the_data_set(serve):
  records = [
    _record(task, "red", i, answers={"red": 1.0}, box=(0, 0, 1, 1))
    for task in TASKS
    for i in range(10)
  ]
  serve(records)
  report, predictions = evaluator.evaluate_tasks(
    _oracle(), _identity(), split="test", max_examples=4, batch_size=3
  )
  assert report["counts"] == dict.fromkeys(sorted(TASKS), 4)
  for task in TASKS:
    found = [p for p in predictions if p["task"] == task]
    assert [p["index"] for p in found] == [0, 2, 5, 7]
    assert [p["id"] for p in found] == [f"{task}{i}" for i in (0, 2, 5, 7)]


def test_all_tasks_and_calls_share_one_compilation(serve):
  serve(_known_records())
  events = collections.Counter()

  def listener(event: str, duration_secs: float, **kwargs: Any) -> None:
    del duration_secs, kwargs
    events[event] += 1

  name = "/jax/core/compile/backend_compile_duration"
  experiment = _oracle(scale=29.0)
  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    evaluator.evaluate_tasks(
      experiment, _identity(), split="test", batch_size=4
    )
    assert events[name] == 1
    evaluator.evaluate_tasks(
      experiment, _identity(), split="test", batch_size=4
    )
    # Another object of an equal model, as after a restore.
    evaluator.evaluate_tasks(
      _oracle(scale=29.0),
      _identity(),
      split="test",
      batch_size=4,
      max_examples=1,
    )
    assert events[name] == 1
    evaluator.evaluate_tasks(
      experiment, _identity(), split="test", batch_size=5
    )
    assert events[name] == 2
  finally:
    jax.monitoring.unregister_event_duration_listener(listener)


def _answers(variables: Any, batch_size: int) -> list[tuple[Any, float]]:
  experiment, _ = tiny_run.tiny_model()
  _, predictions = evaluator.evaluate_tasks(
    experiment, variables, split="test", max_examples=19, batch_size=batch_size
  )
  return [(p["prediction"], p["probability"]) for p in predictions]


def test_answers_depend_neither_on_batches_nor_on_devices():
  _, variables = tiny_run.tiny_model()
  expected = _answers(variables, 16)
  assert len(set(map(str, expected))) > 19  # The model distinguishes requests.
  mesh = parallel.make_mesh(8)
  spread = jax.device_put(variables, parallel.replicated(mesh))
  for found in (_answers(variables, 5), _answers(spread, 13)):
    assert [x for x, _ in found] == [x for x, _ in expected]
    np.testing.assert_allclose(
      [p for _, p in found], [p for _, p in expected], rtol=1e-3
    )


def test_unknown_split_and_data_set():
  experiment, variables = tiny_run.tiny_model()
  with pytest.raises(UserError, match=r'unknown split "tset".*"test"'):
    evaluator.evaluate_tasks(experiment, variables, split="tset", batch_size=4)
  with pytest.raises(UserError, match=r'no "vqq".*"vqa"'):
    load_dataset(experiment.config, "vqq", "test")


def test_the_partition_of_a_data_set_is_reported(serve):
  serve(_known_records())
  experiment = _oracle()
  experiment.config.data.evaluation.grounding.partition = "umd"
  report, _ = evaluator.evaluate_tasks(
    experiment, _identity(), split="test", batch_size=4
  )
  assert report["datasets"]["grounding"]["partition"] == "umd"
  assert "partition" not in report["datasets"]["vqa"]


def test_intervals_are_there_when_asked_for(serve):
  serve(_known_records())
  options = Options(intervals=True)
  report, predictions = evaluator.evaluate_tasks(
    _oracle(), _identity(), split="test", batch_size=4, options=options
  )
  intervals = report["intervals"]
  for task, metrics in report["tasks"].items():
    assert list(intervals[task]) == list(metrics)
    for name, value in metrics.items():
      low, high = intervals[task][name]
      assert low <= value <= high
  assert intervals["entailment"]["accuracy"] == [0.0, 1.0]
  # What is drawn is known to the predictions as well.
  assert all(len(x["image"]) == 16 for x in predictions)


def _tally(positions: Iterable[int]) -> Tally:
  """A host that predicted examples 0 to 4 of "b" and 5 to 7 of "a"."""
  tally = Tally(Options(intervals=True))
  for position in positions:
    name, index = ("b", position) if position < 5 else ("a", position - 5)
    record = _record(
      "vqa", "red", position, answers={"red": 1 / (position + 3)}
    )
    answer = Answer(record, index, "red", 0.0)
    tally.update(answer, position, dataset=name, index=index)
  return tally


def test_several_hosts_report_what_one_does(monkeypatch):
  whole = _tally(range(8))
  # Hosts with rows that are no neighbours; the last two share theirs.
  hosts = [_tally((0, 2, 4, 6)), _tally((1, 3, 5, 7)), _tally((1, 3, 5, 7))]
  parts = json.loads(json.dumps([host._to_json() for host in hosts]))

  def gather(own: Any) -> list[Any]:
    assert json.loads(json.dumps(own)) == parts[1]
    return parts

  monkeypatch.setattr(tally_lib.distributed, "gather_json", gather)
  found = hosts[1].of_all_hosts()
  found.check(8)
  assert list(found.predictions.items()) == list(whole.predictions.items())
  # Equal to the last bit.
  assert found.report(split="test", step=1) == whole.report(
    split="test", step=1
  )
  assert found.report(split="test", step=1)["counts"] == {"vqa": 8}


def test_every_example_is_counted():
  tally = _tally([0, 1, 3])
  tally.bad = {2: ("vqa", "vqa")}
  tally.check(4)
  with pytest.raises(RuntimeError, match=r"1 of 5 examples .* as number 4"):
    tally.check(5)
  # Of two hosts, one example on both and one on none.
  whole = Tally(tally.options)
  for positions in ((0, 2), (2, 3)):
    whole.merge(_tally(positions))
  assert whole.report(split="test", step=1)["counts"] == {"vqa": 3}
  with pytest.raises(RuntimeError, match=r"1 of 4 examples .* as number 1"):
    whole.check(4)
  del tally.metrics["vqa"][0].measured[3]
  with pytest.raises(RuntimeError, match=r"VqaAccuracy has 2 .* 3 predictions"):
    tally.check(4)


def test_progress_comes_to_the_end_of_all_examples(serve, monkeypatch):
  """Also where a record is bad, and where other hosts answer some."""
  records = _known_records()
  bad = dataclasses.replace(records[1], image=b"no picture")
  serve([bad if record is records[1] else record for record in records])
  shown = []

  class Noted(Activity):
    def __init__(self, *args: Any, **settings: Any) -> None:
      super().__init__(*args, **settings)
      shown.append(self)

  monkeypatch.setattr(progress, "Activity", Noted)
  experiment = _oracle()
  experiment.config.data.max_bad_fraction = 0.5
  evaluator.evaluate_tasks(experiment, _identity(), split="test", batch_size=2)
  (activity,) = shown
  assert (activity.text, activity.unit) == ("evaluating test", "examples")
  assert activity.done == activity.total == len(records)
