"""Predictions and metrics of an evaluation, on one host or several."""

import collections
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from narvl_jax.data.example import Box, Record
from narvl_jax.evaluation.grounding import SIZES, size_of
from narvl_jax.evaluation.metric import CHEAP, MeanMetric, Metric, Options
from narvl_jax.evaluation.metrics import METRICS, make_metrics
from narvl_jax.evaluation.reporting import Prediction, Report
from narvl_jax.hosts import distributed
from narvl_jax.prediction.predictor import Answer

# Key of the report -> key of the predictions by which it groups a task.
_GROUPS = {"kinds": "kind", "question_types": "question_type", "sizes": "size"}


class Tally:
  """Predictions and metrics of an evaluation so far.

  Attributes:
    options: options of the evaluation.
    predictions: position of an example in the evaluation -> its prediction.
    bad: positions of bad records, which have no prediction.
    metrics: task -> its metrics.
  """

  def __init__(self, options: Options = CHEAP) -> None:
    self.options = options
    self.predictions: dict[int, Prediction] = {}
    self.bad: set[int] = set()
    self.metrics: Mapping[str, list[Metric]] = {
      task: make_metrics(task, options) for task in METRICS
    }

  def update(
    self, answer: Answer, position: int, *, dataset: str, index: int
  ) -> None:
    """Adds an example.

    Args:
      answer: answer of the model.
      position: position of the example in the evaluation.
      dataset: entry of `config.data.evaluation`.
      index: index of the record in the data set.
    """
    scores = {}
    for metric in self.metrics[answer.record.task]:
      metric.update(answer.record, answer.value, position)
      if isinstance(metric, MeanMetric):
        scores |= metric.measured[position] or {}
    self.predictions[position] = {
      **describe(answer, scores or None),
      "dataset": dataset,
      "index": index,
    }
    if self.options.intervals:
      identity = _identity(answer.record.image)
      self.predictions[position]["image"] = identity

  def merge(self, other: "Tally") -> None:
    """Adds what another host evaluated.

    Hosts that share rows of a batch predict the same examples. Those that are
    here already are left out, so that each example counts once.
    """
    new = other.predictions.keys() - self.predictions.keys()
    united = self.predictions | {i: other.predictions[i] for i in new}
    self.predictions = dict(sorted(united.items()))
    self.bad |= other.bad
    for task, metrics in self.metrics.items():
      for metric, theirs in zip(metrics, other.metrics[task], strict=True):
        theirs.measured = {i: x for i, x in theirs.measured.items() if i in new}
        metric.merge(theirs)

  def of_all_hosts(self) -> "Tally":
    """Returns the tally of all hosts, on each of them."""
    parts = distributed.gather_json(self._to_json())
    if len(parts) == 1:
      return self
    whole = Tally(self.options)
    for part in parts:
      whole.merge(_from_json(part, self.options))
    return whole

  def check(self, total: int) -> None:
    """Checks that examples 0 to `total` - 1 are counted once each.

    Raises:
      RuntimeError: an example is missing, or counted by some metrics only.
    """
    tasks = self._group(self.predictions, "task")
    for task, metrics in self.metrics.items():
      for metric in metrics:
        if sorted(metric.measured) != tasks.get(task, []):
          raise RuntimeError(
            f"{type(metric).__name__} has {len(metric.measured)} examples of"
            f" {task}, but there are {len(tasks.get(task, []))} predictions"
          )
    missing = set(range(total)) - self.predictions.keys() - self.bad
    if missing:
      raise RuntimeError(
        f"{len(missing)} of {total} examples were evaluated by no host, such"
        f" as number {min(missing)}"
      )

  def report(self, *, split: str, step: int | None) -> Report:
    """Returns the counts and results that `evaluate_tasks` describes."""
    tasks = self._group(self.predictions, "task")
    datasets = self._group(self.predictions, "dataset")
    report: Report = {
      "split": split,
      "step": step,
      "examples": len(self.predictions),
      "tasks": {task: self._results(task) for task in tasks},
      "counts": {task: len(of) for task, of in tasks.items()},
      **{
        name: {task: self._groups(task, of, key) for task, of in tasks.items()}
        for name, key in _GROUPS.items()
      },
      "datasets": {
        name: {"task": task, "examples": len(of)} | self._results(task, of)
        for name, of in datasets.items()
        for task in [self.predictions[of[0]]["task"]]
      },
    }
    for task in tasks:
      for metric in self.metrics[task]:
        known = metric.known()
        found = metric.details(list(known.values())) if known else {}
        for name, value in found.items():
          report.setdefault(name, {})[task] = value
    if self.options.intervals:
      report["intervals"] = {task: self._intervals(task) for task in tasks}
    return report

  def _intervals(self, task: str) -> dict[str, list[float]]:
    pictures = {i: x["image"] for i, x in self.predictions.items()}
    return {
      name: [*bounds]
      for metric in self.metrics[task]
      for name, bounds in metric.intervals(pictures).items()
    }

  def _groups(
    self, task: str, positions: list[int], key: str
  ) -> dict[str, dict[str, Any]]:
    """Returns the results of each group that has a name."""
    groups = self._group(positions, key)
    groups.pop("", None)
    order = {size: i for i, size in enumerate(SIZES)} if key == "size" else {}
    return {
      name: self._results(task, groups[name]) | {"examples": len(groups[name])}
      for name in sorted(groups, key=lambda name: (order.get(name, 0), name))
    }

  def _group(self, positions: Iterable[int], key: str) -> dict[str, list[int]]:
    groups = collections.defaultdict(list)
    for position in positions:
      groups[self.predictions[position].get(key, "")].append(position)
    return dict(groups)

  def _results(
    self, task: str, positions: list[int] | None = None
  ) -> dict[str, float]:
    """Returns the results of a group of examples; of the whole task if None."""
    found = {}
    for metric in self.metrics[task]:
      if positions is None or metric.of_groups:
        found |= metric.result(positions)
    return found

  def _to_json(self) -> list[Any]:
    """Keys of JSON objects are strings, hence lists of pairs."""
    measured = {
      task: [list(metric.measured.items()) for metric in metrics]
      for task, metrics in self.metrics.items()
    }
    return [list(self.predictions.items()), list(self.bad), measured]


def _identity(image: bytes | np.ndarray) -> str:
  data = image if isinstance(image, bytes) else image.tobytes()
  return hashlib.blake2b(data, digest_size=8).hexdigest()


def _from_json(values: list[Any], options: Options) -> Tally:
  tally = Tally(options)
  predictions, bad, measured = values
  tally.predictions, tally.bad = dict(predictions), set(bad)
  for task, metrics in tally.metrics.items():
    for metric, pairs in zip(metrics, measured[task], strict=True):
      metric.measured = dict(pairs)
  return tally


def describe(
  answer: Answer, scores: Mapping[str, float] | None = None
) -> Prediction:
  """Returns an answer as JSON can hold it.

  `scores` are the example's metrics, None without ground truth; `correct` is
  whether the main metric is at least one half. `target` is the best answer or
  the box, `answers` are all valid answers with their scores. `question_type`
  and the `size` of the true box are left out where they are unknown. Only
  calibrated answers have `raw_probability`, and only boxes
  `probability_iou50`; `loss` is that of the truth, which may be unknown. See
  `predictor.Answer`.
  """
  record = answer.record
  groups = {
    "question_type": record.question_type,
    "size": size_of(record.box) if record.box else "",
  }
  return {
    "id": record.id,
    "task": record.task,
    "kind": record.kind,
    **{key: group for key, group in groups.items() if group},
    "prompt": record.prompt,
    "prediction": _plain(answer.value),
    "target": _plain(_target(record)),
    **probabilities(answer),
    **({} if answer.loss is None else {"loss": answer.loss}),
    "correct": next(iter(scores.values())) >= 0.5 if scores else None,
    "scores": scores,
    "answers": {k: float(v) for k, v in record.answers.items()},
  }


def probabilities(answer: Answer) -> dict[str, float]:
  """Returns the probabilities of an answer that are known."""
  found = {"probability": answer.probability}
  if answer.temperature is not None:
    found["raw_probability"] = answer.raw_probability
  if answer.probability_iou50 is not None:
    found["probability_iou50"] = answer.probability_iou50
  return found


def _target(record: Record) -> str | Box | None:
  if record.task != "grounding" and record.answers:
    return max(record.answers, key=record.answers.__getitem__)
  return record.box


def _plain(answer: str | Box | None) -> str | list[float] | None:
  if answer is None or isinstance(answer, str):
    return answer
  return [float(x) for x in answer]
