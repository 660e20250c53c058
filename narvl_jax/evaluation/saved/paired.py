"""Differences of two evaluations on the same examples."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.evaluation.reporting import GROUPS, Prediction
from narvl_jax.metrics import bootstrap
from narvl_jax.metrics.captions import simple_cider

# Identity of an example, and values that must be equal in both evaluations.
_KEY = ("task", "dataset", "index", "id")
_TRUTH = ("target", "answers")
CIDER = "cider@simple"
# Metric, scores of the first, scores of the second.
_Scores = tuple[str, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Predictions of the same examples.

  Attributes:
    first: predictions of one system.
    second: those of the other system, in the same order.
    only_first: number of examples that only the first system predicted.
    only_second: number of examples that only the second system predicted.
  """

  first: list[Prediction]
  second: list[Prediction]
  only_first: int
  only_second: int


def match(first: Sequence[Prediction], second: Sequence[Prediction]) -> Pairs:
  """Pairs predictions by task, data set, index and id.

  Args:
    first: see `tally.describe`; each example once.
    second: those of the other system.

  Raises:
    UserError: no example is in both, one occurs twice in a list, or the ground
      truth of a pair differs.
  """
  one, other = _by_key(first, "first"), _by_key(second, "second")
  common = [key for key in one if key in other]
  if not common:
    raise UserError(
      f"none of the {len(one):,} examples of the first is among the"
      f" {len(other):,} of the second; the first ones are"
      f" {_name(next(iter(one)))} and {_name(next(iter(other)))}. Evaluate both"
      " on the same data, under the same names of data.evaluation"
    )
  for key in common:
    if any(one[key][x] != other[key][x] for x in _TRUTH):
      raise UserError(
        f"the ground truth of {_name(key)} differs:"
        f" {one[key]['target']!r} and {other[key]['target']!r}, or its other"
        " answers; evaluate both on the same data"
      )
  return Pairs(
    [one[key] for key in common],
    [other[key] for key in common],
    len(one) - len(common),
    len(other) - len(common),
  )


def _by_key(
  predictions: Sequence[Prediction], which: str
) -> dict[tuple[Any, ...], Prediction]:
  found = {tuple(x[key] for key in _KEY): x for x in predictions}
  if len(found) != len(predictions):
    raise UserError(
      f"{len(predictions) - len(found):,} predictions of the {which} are there"
      " twice; repeat narvl_jax.evaluate"
    )
  return found


def _name(key: Sequence[Any]) -> str:
  _, dataset, index, name = key
  return f'example {index} of "{dataset}" (id "{name}")'


def compare(
  pairs: Pairs, *, level: float = 0.95, by: Collection[str] = ()
) -> dict[str, Any]:
  """Computes the difference of each metric by a paired bootstrap.

  Pictures are resampled if all predictions name theirs, otherwise examples.

  Args:
    pairs: pairs of predictions, at least one.
    level: level of the intervals.
    by: keys of the predictions, of `GROUPS`: adds "kinds", "question_types" or
      "sizes": group -> examples and metrics.

  Returns:
    Task -> `images` (number of pictures, None if unknown), `examples` and
    `metrics`: name -> first, second, difference (first - second), low, high,
    p_value and examples with scores. Scores are in [0, 1], those of CIDEr-D
    from 0 to 10.
  """
  report = {}
  for task in dict.fromkeys(x["task"] for x in pairs.first):
    one, other = (
      [x for x in system if x["task"] == task]
      for system in (pairs.first, pairs.second)
    )
    scores = list(_scores(one, other))
    images, groups = _groups(one)
    every = range(len(one))
    report[task] = {"images": images, **_entry(scores, groups, every, level)}
    for name, key in GROUPS.items():
      of = [x.get(key, "") for x in one]
      if key in by:
        report[task][name] = {
          group: _entry(
            scores, groups, [i for i in every if of[i] == group], level
          )
          for group in sorted({*of} - {""})
        }
  return report


def _entry(
  scores: Sequence[_Scores],
  groups: Sequence[Any],
  chosen: Sequence[int],
  level: float,
) -> dict[str, Any]:
  differences = {
    name: _difference(one, other, groups, chosen, level)
    for name, one, other in scores
  }
  metrics = {name: found for name, found in differences.items() if found}
  return {"examples": len(chosen), "metrics": metrics}


def _groups(predictions: Sequence[Prediction]) -> tuple[int | None, list[Any]]:
  """Returns the number of pictures, and the picture of each example."""
  groups = [x.get("image") for x in predictions]
  if not all(groups):
    return None, list(range(len(predictions)))
  return len(set(groups)), groups


def _scores(
  first: Sequence[Prediction], second: Sequence[Prediction]
) -> Iterator[_Scores]:
  """Yields metrics with the scores of both, NaN where an example has none."""
  names = [
    dict.fromkeys(name for x in system for name in x["scores"] or ())
    for system in (first, second)
  ]
  for name in names[0]:
    if name in names[1]:
      one, other = (
        [(x["scores"] or {}).get(name, np.nan) for x in system]
        for system in (first, second)
      )
      yield name, np.asarray(one, np.float64), np.asarray(other, np.float64)
  captions = [
    i for i, x in enumerate(first) if x["task"] == "caption" and x["answers"]
  ]
  if captions and CIDER not in names[0]:
    yield CIDER, _cider(first, captions), _cider(second, captions)


def _cider(predictions: Sequence[Prediction], rows: list[int]) -> np.ndarray:
  scores = np.full(len(predictions), np.nan)
  chosen = [predictions[i] for i in rows]
  scores[rows] = simple_cider(
    [x["prediction"] for x in chosen], [list(x["answers"]) for x in chosen]
  ).scores
  return scores


def _difference(
  one: np.ndarray,
  other: np.ndarray,
  groups: Sequence[Any],
  chosen: Sequence[int],
  level: float,
) -> dict[str, float]:
  """Returns an entry of "metrics"; empty if no chosen example has scores."""
  kept = [i for i in chosen if not np.isnan(one[i] + other[i])]
  if not kept:
    return {}
  found = bootstrap.paired_difference(
    bootstrap.with_counts(one[kept]),
    bootstrap.with_counts(other[kept]),
    [groups[i] for i in kept],
    level=level,
  )
  return {
    "first": float(one[kept].mean()),
    "second": float(other[kept].mean()),
    "difference": found.value,
    "low": found.low,
    "high": found.high,
    "p_value": found.p_value,
    "examples": len(kept),
  }
