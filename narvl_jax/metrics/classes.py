"""Figures of predictions of few classes: per class, confusion matrix, POPE."""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from narvl_jax.metrics import bootstrap

# Column of predictions outside of the classes.
OTHER = "(other)"


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Counts of predicted classes for each true class.

  Attributes:
    classes: names of the true classes.
    counts: int [classes, classes + 1]; rows are true, columns predicted. The
      last column counts predictions outside of the classes.
  """

  classes: tuple[str, ...]
  counts: np.ndarray

  @property
  def accuracy(self) -> float:
    """Share of correct predictions, in [0, 1]; NaN without examples."""
    return _ratio(int(np.trace(self.counts)), int(self.counts.sum()))

  def per_class(self) -> dict[str, dict[str, float]]:
    """Returns class -> precision, recall, f1 (in [0, 1] or NaN), examples."""
    report = {}
    for i, name in enumerate(self.classes):
      hits = int(self.counts[i, i])
      true, predicted = int(self.counts[i].sum()), int(self.counts[:, i].sum())
      report[name] = {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, true),
        "f1": _ratio(2 * hits, true + predicted),
        "examples": true,
      }
    return report


def confusion(
  predictions: Sequence[str], targets: Sequence[str], classes: Sequence[str]
) -> Confusion:
  """Counts predictions of true classes.

  Args:
    predictions: texts, any.
    targets: true classes, one per prediction.
    classes: names, in the order of the matrix.

  Raises:
    ValueError: a target is not a class, or the lengths differ.
  """
  index = {name: i for i, name in enumerate(classes)}
  counts = np.zeros((len(classes), len(classes) + 1), np.int64)
  for prediction, target in zip(predictions, targets, strict=True):
    if target not in index:
      raise ValueError(f'"{target}" is none of {", ".join(classes)}')
    counts[index[target], index.get(prediction, len(classes))] += 1
  return Confusion(tuple(classes), counts)


def pope(
  predictions: Sequence[str], targets: Sequence[str]
) -> dict[str, float]:
  """Returns the figures of POPE for one of its subsets, see `BINARY`.

  Polling questions about objects, "Is there a dog in the image?" (Li et al.
  2023, arXiv 2305.10355). As in its program, the positive class is "yes", and
  an answer that contains the word "no" or "not" is a "no"; any other is "yes".

  Args:
    predictions: answers, any text.
    targets: "yes" or "no" of each question.

  Returns:
    accuracy, precision, recall, f1 and yes_ratio, in [0, 1]; NaN where a
    denominator is 0.
  """
  sums = binary_statistics(map(polled, predictions), targets, "yes").sum(0)
  return {name: float(figure(sums)) for name, figure in BINARY.items()}


def binary_statistics(
  predictions: Iterable[str], targets: Iterable[str], positive: str
) -> np.ndarray:
  """Returns true and false positives, false and true negatives, [examples, 4].

  Args:
    predictions: any texts.
    targets: as many texts.
    positive: the positive class; all other texts are negative.
  """
  said, true = (
    np.asarray([x == positive for x in texts], bool)
    for texts in (predictions, targets)
  )
  cells = said & true, said & ~true, ~said & true, ~said & ~true
  return np.stack(cells, -1).astype(np.float64)


def _share(part: tuple[int, ...], whole: tuple[int, ...]) -> bootstrap.Figure:
  """Returns a ratio of sums of the columns of `binary_statistics`."""

  def figure(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
      return sums[..., part].sum(-1) / sums[..., whole].sum(-1)

  return figure


# Figures of the sums of `binary_statistics`, in [0, 1]; NaN where a denominator
# is 0.
BINARY: Mapping[str, bootstrap.Figure] = {
  "accuracy": _share((0, 3), (0, 1, 2, 3)),
  "precision": _share((0,), (0, 1)),
  "recall": _share((0,), (0, 2)),
  "f1": _share((0, 0), (0, 0, 1, 2)),
  "yes_ratio": _share((0, 1), (0, 1, 2, 3)),
}


def binary_samples(
  predictions: Iterable[str],
  targets: Iterable[str],
  positive: str,
  groups: Sequence[Hashable],
) -> dict[str, bootstrap.Sample]:
  """Returns the samples of the figures `BINARY`.

  Args:
    predictions: see `binary_statistics`.
    targets: see `binary_statistics`.
    positive: see `binary_statistics`.
    groups: picture of each example.
  """
  statistics = binary_statistics(predictions, targets, positive)
  return {
    name: bootstrap.Sample(statistics, groups, figure)
    for name, figure in BINARY.items()
  }


def polled(text: str) -> str:
  """Returns the answer that POPE reads in a text: "yes" or "no"."""
  # The first sentence counts.
  words = text.split(".")[0].replace(",", "").split()
  return "no" if {"No", "not", "no"} & set(words) else "yes"


def _ratio(part: int, whole: int) -> float:
  return part / whole if whole else float("nan")
