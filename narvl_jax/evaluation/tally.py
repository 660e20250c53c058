"""Predictions and metrics of an evaluation, on one host or several."""

import collections
from collections.abc import Iterable, Mapping
from typing import Any

from narvl_jax.data.example import Box, Record
from narvl_jax.evaluation.metric import MeanMetric, Metric
from narvl_jax.evaluation.metrics import METRICS
from narvl_jax.evaluation.reporting import Prediction, Report
from narvl_jax.hosts import distributed
from narvl_jax.prediction.predictor import Answer


class Tally:
  """What has been evaluated so far.

  Attributes:
    predictions: position of an example in the evaluation -> its prediction.
    bad: positions of bad records, which have no prediction.
    metrics: task -> its metrics.
  """

  def __init__(self) -> None:
    self.predictions: dict[int, Prediction] = {}
    self.bad: set[int] = set()
    self.metrics: Mapping[str, list[Metric]] = {
      task: [metric() for metric in metrics]
      for task, metrics in METRICS.items()
    }

  def update(
    self, answer: Answer, position: int, *, dataset: str, index: int
  ) -> None:
    """Adds an example.

    Args:
      answer: of the model.
      position: of the example in the evaluation.
      dataset: entry of `config.data.evaluation`.
      index: of the record in the data set.
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
    whole = Tally()
    for part in parts:
      whole.merge(_from_json(part))
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
    return {
      "split": split,
      "step": step,
      "examples": len(self.predictions),
      "tasks": {task: self._results(task, of) for task, of in tasks.items()},
      "counts": {task: len(of) for task, of in tasks.items()},
      "kinds": {
        task: {
          kind: self._results(task, members) | {"examples": len(members)}
          for kind, members in sorted(self._group(of, "kind").items())
          if kind
        }
        for task, of in tasks.items()
      },
      "datasets": {
        name: {"task": task, "examples": len(of)} | self._results(task, of)
        for name, of in datasets.items()
        for task in [self.predictions[of[0]]["task"]]
      },
    }

  def _group(self, positions: Iterable[int], key: str) -> dict[str, list[int]]:
    groups = collections.defaultdict(list)
    for position in positions:
      groups[self.predictions[position][key]].append(position)
    return dict(groups)

  def _results(self, task: str, positions: Iterable[int]) -> dict[str, float]:
    found = {}
    for metric in self.metrics[task]:
      found |= metric.result(positions)
    return found

  def _to_json(self) -> list[Any]:
    """Keys of JSON objects are strings, hence lists of pairs."""
    measured = {
      task: [list(metric.measured.items()) for metric in metrics]
      for task, metrics in self.metrics.items()
    }
    return [list(self.predictions.items()), list(self.bad), measured]


def _from_json(values: list[Any]) -> Tally:
  tally = Tally()
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
  the box, `answers` are all valid answers with their scores.
  """
  record = answer.record
  return {
    "id": record.id,
    "task": record.task,
    "kind": record.kind,
    "prompt": record.prompt,
    "prediction": _plain(answer.value),
    "target": _plain(_target(record)),
    "probability": answer.probability,
    "correct": next(iter(scores.values())) >= 0.5 if scores else None,
    "scores": scores,
    "answers": {k: float(v) for k, v in record.answers.items()},
  }


def _target(record: Record) -> str | Box | None:
  if record.task != "grounding" and record.answers:
    return max(record.answers, key=record.answers.__getitem__)
  return record.box


def _plain(answer: str | Box | None) -> str | list[float] | None:
  if answer is None or isinstance(answer, str):
    return answer
  return [float(x) for x in answer]
