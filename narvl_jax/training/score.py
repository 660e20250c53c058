"""One number out of a report, by which the best checkpoint is chosen."""

from collections.abc import Iterable, Mapping
from typing import Any

from narvl_jax.errors import UserError, did_you_mean

# Metrics of each task; the first one enters "mean".
METRICS = {
  "caption": ("exact_match", "token_f1"),
  "vqa": ("accuracy",),
  "grounding": ("acc@0.5", "mean_iou"),
  "entailment": ("accuracy",),
}


def flat_metrics(report: Mapping[str, Any]) -> dict[str, float]:
  """Returns {SPLIT/TASK/METRIC: value} of a report."""
  return {
    f"{report['split']}/{task}/{name}": value
    for task, metrics in report["tasks"].items()
    for name, value in metrics.items()
  }


def check_best_metric(best_metric: str, tasks: Iterable[str]) -> None:
  """Checks `evaluation.best_metric`.

  Args:
    best_metric: "mean" or TASK/METRIC.
    tasks: those of the run.

  Raises:
    UserError: the run will not measure it.
  """
  valid = ["mean"]
  valid += [f"{task}/{name}" for task in tasks for name in METRICS[task]]
  if best_metric not in valid:
    raise UserError(
      f'evaluation.best_metric="{best_metric}" is not measured by this run.'
      f"{did_you_mean(best_metric, valid)} (--config.evaluation.best_metric)"
    )


def score_of(report: Mapping[str, Any], best_metric: str) -> float:
  """Returns the score of an evaluation, higher is better.

  Args:
    report: of `evaluate_tasks`.
    best_metric: "mean" of the main metrics of all tasks, or TASK/METRIC.
  """
  tasks = report["tasks"]
  if best_metric != "mean":
    task, name = best_metric.split("/")
    return tasks[task][name]
  values = [tasks[task][METRICS[task][0]] for task in tasks]
  return sum(values) / len(values)
