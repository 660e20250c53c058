"""The score of a report, by which the best checkpoint is chosen."""

from collections.abc import Iterable, Mapping
from typing import Any

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation.metrics import metric_names


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
    tasks: evaluated by the run.

  Raises:
    UserError: the run does not measure it.
  """
  valid = ["mean"]
  valid += [f"{task}/{name}" for task in tasks for name in metric_names(task)]
  if best_metric not in valid:
    raise UserError(
      f'evaluation.best_metric="{best_metric}" is not measured by this run.'
      f"{did_you_mean(best_metric, valid)} (--config.evaluation.best_metric)"
    )


def score_of(report: Mapping[str, Any], best_metric: str) -> float | None:
  """Returns the score of an evaluation, higher is better.

  Args:
    report: report of `evaluate_tasks`.
    best_metric: "mean" of the main metrics of all tasks, or TASK/METRIC.

  Returns:
    The score; None if no example of these tasks has ground truth.
  """
  tasks = report["tasks"]
  if best_metric != "mean":
    task, name = best_metric.split("/")
    return tasks[task].get(name)
  values = [
    metrics[metric_names(task)[0]] for task, metrics in tasks.items() if metrics
  ]
  return sum(values) / len(values) if values else None
