"""Predictions and metrics of an evaluation, on one host or several."""

import collections
import functools
import hashlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from narvl_jax.data.example import Box, Record
from narvl_jax.evaluation.grounding import SIZES, size_of
from narvl_jax.evaluation.metric import CHEAP, MeanMetric, Metric, Options
from narvl_jax.evaluation.metrics import METRICS, make_metrics
from narvl_jax.evaluation.reporting import GROUPS, Prediction, Report
from narvl_jax.hosts import distributed
from narvl_jax.metrics import bootstrap
from narvl_jax.prediction.predictor import Answer


class Tally:
  """Predictions and metrics of an evaluation so far.

  Attributes:
    options: options of the evaluation.
    predictions: position of an example in the evaluation -> its prediction.
    bad: position of a bad record, which has no prediction -> its task and data
      set.
    metrics: task -> its metrics.
  """

  def __init__(self, options: Options = CHEAP) -> None:
    self.options = options
    self.predictions: dict[int, Prediction] = {}
    self.bad: dict[int, tuple[str, str]] = {}
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
    missing = set(range(total)) - self.predictions.keys() - self.bad.keys()
    if missing:
      raise RuntimeError(
        f"{len(missing)} of {total} examples were evaluated by no host, such"
        f" as number {min(missing)}"
      )

  def report(self, *, split: str, step: int | None) -> Report:
    """Returns the counts and results that `evaluate_tasks` describes.

    Bad records count as wrong in the means of their task and data set.
    """
    tasks = self._group(self.predictions, "task")
    for position, (task, name) in self.bad.items():
      others = self._group(tasks.get(task, []), "dataset").get(name, [])
      for metric in self.metrics[task]:
        metric.miss(position, others)
    report: Report = {
      "split": split,
      "step": step,
      "examples": len(self.predictions),
      "tasks": {},
      "counts": {task: len(of) for task, of in tasks.items()},
      **{name: {} for name in GROUPS},
      "datasets": {},
    }
    if self.options.intervals:
      report["intervals"] = {}
    for task, positions in tasks.items():
      self._report_task(report, task, positions)
    return report

  def _report_task(
    self, report: Report, task: str, positions: list[int]
  ) -> None:
    """Adds the results of a task, of its groups and of its data sets."""
    with_intervals = self.options.intervals
    pictures = {i: x.get("image", "") for i, x in self.predictions.items()}
    pictures |= {i: f"bad {i}" for i in self.bad}
    # Intervals by name and their samples, which share their draws.
    drawn: list[tuple[dict[str, Any], dict[str, bootstrap.Sample]]] = []

    def results(of: list[int] | None = None) -> tuple[dict[str, Any], Any]:
      found, bounds = {}, {}
      for metric in self.metrics[task]:
        if of is None or metric.of_groups:
          found |= metric.result(of)
          if with_intervals:
            drawn.append((bounds, metric.samples(pictures, of)))
      return found, bounds

    def entry(of: list[int], count: int) -> dict[str, Any]:
      found, bounds = results(of)
      own = {"intervals": bounds} if with_intervals else {}
      return {**found, **own, "examples": count}

    report["tasks"][task], bounds = results()
    if with_intervals:
      report["intervals"][task] = bounds
    for name, key in GROUPS.items():
      report[name][task] = {
        group: entry(of, len(of))
        for group, of in self._named_groups(positions, key)
      }
    for name, of in self._group(positions, "dataset").items():
      bad = [i for i, x in self.bad.items() if x == (task, name)]
      counts = {"task": task, "records": len(of) + len(bad)}
      report["datasets"][name] = counts | entry([*of, *bad], len(of))
    for metric in self.metrics[task]:
      known = metric.known()
      found = metric.details(list(known.values())) if known else {}
      for name, value in found.items():
        report.setdefault(name, {})[task] = value
      if not with_intervals:
        continue
      for (name, *path), samples in metric.detail_samples(pictures).items():
        place = functools.reduce(operator.getitem, path, report[name][task])
        place["intervals"] = {}
        drawn.append((place["intervals"], samples))
    _draw(drawn)

  def _group(self, positions: Iterable[int], key: str) -> dict[str, list[int]]:
    groups = collections.defaultdict(list)
    for position in positions:
      groups[self.predictions[position].get(key, "")].append(position)
    return dict(groups)

  def _named_groups(
    self, positions: Iterable[int], key: str
  ) -> list[tuple[str, list[int]]]:
    """Returns the groups that have a name, in order of name or size."""
    groups = self._group(positions, key)
    groups.pop("", None)
    order = {size: i for i, size in enumerate(SIZES)} if key == "size" else {}
    return sorted(groups.items(), key=lambda x: (order.get(x[0], 0), x[0]))

  def _to_json(self) -> list[Any]:
    """Keys of JSON objects are strings, hence lists of pairs."""
    measured = {
      task: [list(metric.measured.items()) for metric in metrics]
      for task, metrics in self.metrics.items()
    }
    return [list(self.predictions.items()), list(self.bad.items()), measured]


def _draw(
  drawn: list[tuple[dict[str, Any], dict[str, bootstrap.Sample]]],
) -> None:
  """Writes the 95 % confidence intervals of samples into the entries."""
  samples = {
    (i, name): sample
    for i, (_, named) in enumerate(drawn)
    for name, sample in named.items()
  }
  for (i, name), found in bootstrap.intervals(samples).items():
    if not math.isnan(found.low):
      drawn[i][0][name] = [found.low, found.high]


def _identity(image: bytes | np.ndarray) -> str:
  data = image if isinstance(image, bytes) else image.tobytes()
  return hashlib.blake2b(data, digest_size=8).hexdigest()


def _from_json(values: list[Any], options: Options) -> Tally:
  tally = Tally(options)
  predictions, bad, measured = values
  tally.predictions = dict(predictions)
  tally.bad = {position: (task, name) for position, (task, name) in bad}
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
