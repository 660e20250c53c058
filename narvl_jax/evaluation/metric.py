"""The interface of a metric: values of each example, and their combination.

A metric keeps one value per example and combines the values at the end. That
covers means over examples as well as metrics of a whole corpus, such as BLEU.
A new metric is a subclass in this folder and an entry in `metrics.METRICS`:

    class WordErrors(Metric):
      names = ("word_error_rate",)

      def measure(self, example, prediction):
        if not example.answers:
          return None
        reference = next(iter(example.answers))
        return [edit_distance(prediction, reference), len(reference.split())]

      def reduce(self, measured):
        errors, words = map(sum, zip(*measured))
        return {"word_error_rate": errors / max(words, 1)}

A metric that is a mean over examples subclasses `MeanMetric` instead, and
`measure` returns {name: score}. Its scores are also stored with each
prediction, and it has confidence intervals. Other metrics have intervals if
they return `statistics` of their examples.

Examples have a position: their number among all examples of the evaluation.
On several hosts each host measures its own examples, and `merge` unites them
by position. Results are reduced in the order of positions, so that they do
not depend on the number of hosts, not even by rounding.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from narvl_jax.data.example import Box, Record
from narvl_jax.metrics import bootstrap
from narvl_jax.metrics.cider import DocumentFrequencies

METRIC_SETS = ("cheap", "all")


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of an evaluation, beyond the metrics during training.

  Attributes:
    metrics: one of `METRIC_SETS`; "all" adds those that need Java.
    intervals: whether to compute confidence intervals.
    vqa_rule: one of `narvl_jax.metrics.vqa.RULES`.
    frequencies: document frequencies for CIDEr; those of the evaluated
      references if None.
  """

  metrics: str = "cheap"
  intervals: bool = False
  vqa_rule: str = "vqa_v2"
  frequencies: DocumentFrequencies | None = None


# Options of evaluations during training.
CHEAP = Options()


class Metric(abc.ABC):
  """A figure of a task's predictions; see the module for an example.

  Attributes:
    names: keys of the result. The first name of a task's first metric is the
      main metric of the task.
    of_groups: whether it is also computed for each kind and data set.
    options: options of the evaluation.
    measured: position of an example -> what `measure` returned.
  """

  names: tuple[str, ...]
  of_groups = True

  def __init__(self, options: Options = CHEAP) -> None:
    self.options = options
    self.measured: dict[int, Any] = {}

  @abc.abstractmethod
  def measure(self, example: Record, prediction: Any) -> Any:
    """Returns the values of one example that `reduce` needs.

    Args:
      example: example with its ground truth.
      prediction: text, or for grounding a box in pixels of the original image.

    Returns:
      Numbers, strings, lists and dicts with string keys, which survive JSON
      unchanged; None if the example has no ground truth.
    """

  @abc.abstractmethod
  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns a value for each of `names`.

    Args:
      measured: results of `measure` for at least one example, in order of
        position, without None.
    """

  def statistics(
    self, measured: Sequence[Any]
  ) -> dict[str, tuple[np.ndarray, bootstrap.Figure]]:
    """Returns the statistics for confidence intervals; see `bootstrap`.

    Args:
      measured: see `reduce`.

    Returns:
      Name -> statistics of each example, [examples, k], and the figure of their
      sums. Names without statistics have no interval.
    """
    del measured
    return {}

  def details(self, measured: Sequence[Any]) -> dict[str, Any]:
    """Returns results other than numbers: key of the report -> JSON value.

    Args:
      measured: see `reduce`.
    """
    del measured
    return {}

  def update(
    self, example: Record, prediction: str | Box, position: int
  ) -> None:
    """Adds an example.

    Raises:
      ValueError: the example at this position was added before.
    """
    self._add({position: self.measure(example, prediction)})

  def merge(self, other: "Metric") -> None:
    """Adds the examples of another host.

    Raises:
      ValueError: an example is in both.
    """
    self._add(other.measured)

  def result(self, positions: Iterable[int] | None = None) -> dict[str, float]:
    """Returns the values over the examples with ground truth.

    Args:
      positions: positions of the examples, all by default.

    Returns:
      A value for each of `names`; empty if no example has ground truth.
    """
    known = self.known(positions)
    return self.reduce(list(known.values())) if known else {}

  def known(self, positions: Iterable[int] | None = None) -> dict[int, Any]:
    """Returns the measured values of examples with ground truth, in order."""
    chosen = sorted(self.measured if positions is None else positions)
    return {i: x for i in chosen if (x := self.measured[i]) is not None}

  def samples(
    self, pictures: Mapping[int, str], positions: Iterable[int] | None = None
  ) -> dict[str, bootstrap.Sample]:
    """Returns the statistics for the confidence interval of each figure.

    Args:
      pictures: position of each example -> identity of its picture.
      positions: see `result`.
    """
    known = self.known(positions)
    if not known:
      return {}
    groups = [pictures[i] for i in known]
    return {
      name: bootstrap.Sample(statistics, groups, figure)
      for name, (statistics, figure) in self.statistics(
        list(known.values())
      ).items()
    }

  def detail_samples(
    self, pictures: Mapping[int, str]
  ) -> dict[tuple[str, ...], dict[str, bootstrap.Sample]]:
    """Returns the `samples` of figures in `details`.

    Args:
      pictures: see `samples`.

    Returns:
      Keys of the entry with the figures, that of the report first -> name ->
      sample.
    """
    del pictures
    return {}

  def miss(self, position: int, others: Iterable[int]) -> None:
    """Adds an example without a prediction, whose record is bad.

    Args:
      position: of the bad record.
      others: positions of the examples of its data set.
    """
    del others
    self.measured[position] = None

  def _add(self, measured: dict[int, Any]) -> None:
    twice = sorted(self.measured.keys() & measured.keys())
    if twice:
      raise ValueError(
        f"{type(self).__name__} counts examples twice, such as number"
        f" {twice[0]}"
      )
    self.measured |= measured


class MeanMetric(Metric):
  """A metric whose values are means; `measure` returns {name: score}."""

  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns the mean of each score."""
    return {
      name: float(np.mean([scores[name] for scores in measured]))
      for name in self.names
    }

  def miss(self, position: int, others: Iterable[int]) -> None:
    """Counts a bad record as wrong, if other examples have ground truth."""
    scored = any(self.measured.get(i) is not None for i in others)
    self.measured[position] = dict.fromkeys(self.names, 0.0) if scored else None

  def statistics(
    self, measured: Sequence[Any]
  ) -> dict[str, tuple[np.ndarray, bootstrap.Figure]]:
    """Returns the scores and their counts."""
    return {
      name: (
        bootstrap.with_counts([scores[name] for scores in measured]),
        bootstrap.mean,
      )
      for name in self.names
    }
