"""Scores of every decoding, and their differences."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from narvl_jax.comparison.case import Case
from narvl_jax.comparison.runs import Run
from narvl_jax.comparison.ways import BASELINE, UNCACHED, Way
from narvl_jax.evaluation import evaluator
from narvl_jax.evaluation.metric import Options
from narvl_jax.evaluation.reporting import Prediction
from narvl_jax.evaluation.saved import paired


def measure(
  case: Case,
  opened: Mapping[str, Run],
  split: str,
  max_examples: int | None,
  stage: Callable[[str], AbstractContextManager[None]],
) -> dict[str, dict[str, Any]]:
  """Evaluates all decodings of a task on the same examples.

  Args:
    opened: the runs, by the model of a decoding.
    max_examples: at most this many of every data set; all if None.
    stage: returns the context of each evaluation.

  Returns:
    Label -> "metrics", the main one first, "examples" and, except for
    `BASELINE`, "difference": the result of `paired.compare` for each metric, of
    the decoding minus `BASELINE`.

  Raises:
    UserError: no such split, or too many records are bad.
  """
  found, predictions = {}, {}
  for way in case.ways:
    # Without a cache the answers are the same.
    if way.decoding is not None and way.label != UNCACHED:
      with stage(f"answers of {way.label}"):
        found[way.label], predictions[way.label] = _evaluate(
          opened[way.model], case.task, way, split, max_examples
        )
  baseline = predictions[BASELINE]
  for label, own in predictions.items():
    if label != BASELINE and own:
      compared = paired.compare(paired.match(own, baseline))
      found[label]["difference"] = compared[case.task]["metrics"]
  return found


def _evaluate(
  run: Run, task: str, way: Way, split: str, max_examples: int | None
) -> tuple[dict[str, Any], list[Prediction]]:
  assert way.decoding is not None
  report, predictions = evaluator.evaluate_tasks(
    run.experiment,
    run.variables,
    split=split,
    max_examples=max_examples,
    step=run.step,
    decodings={task: way.decoding},
    tasks=[task],
    # The predictions then name their pictures.
    options=Options(intervals=True),
  )
  entry = {
    "metrics": report["tasks"].get(task, {}),
    "examples": report["counts"].get(task, 0),
  }
  return entry, predictions
