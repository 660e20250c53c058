"""The interface of a metric: what to keep of an example, how to combine it.

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
prediction.

Examples have a position: their number among all examples of the evaluation.
On several hosts each host measures its own examples, and `merge` unites them
by position. Results are reduced in the order of positions, so that they do
not depend on the number of hosts, not even by rounding.
"""

import abc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from narvl_jax.data.example import Box, Record


class Metric(abc.ABC):
  """A figure of a task's predictions; see the module for an example.

  Attributes:
    names: keys of the result. The first name of a task's first metric is the
      main metric of the task.
    measured: position of an example -> what `measure` returned.
  """

  names: tuple[str, ...]

  def __init__(self) -> None:
    self.measured: dict[int, Any] = {}

  @abc.abstractmethod
  def measure(self, example: Record, prediction: Any) -> Any:
    """Returns what `reduce` needs of one example.

    Args:
      example: with its ground truth.
      prediction: text, or for grounding a box in pixels of the original image.

    Returns:
      Numbers, strings, lists and dicts with string keys, which survive JSON
      unchanged; None if the example has no ground truth.
    """

  @abc.abstractmethod
  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns a value for each of `names`.

    Args:
      measured: of at least one example, in order of position, without None.
    """

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
      positions: of the examples, all by default.

    Returns:
      A value for each of `names`; empty if no example has ground truth.
    """
    chosen = sorted(self.measured if positions is None else positions)
    known = [x for i in chosen if (x := self.measured[i]) is not None]
    return self.reduce(known) if known else {}

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
