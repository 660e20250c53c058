"""The metrics of every task."""

from collections.abc import Mapping

from narvl_jax.evaluation.caption import CaptionMatch, CocoFigures, SimpleCider
from narvl_jax.evaluation.entailment import EntailmentAccuracy, EntailmentTable
from narvl_jax.evaluation.grounding import BoxOverlap
from narvl_jax.evaluation.metric import Metric, Options
from narvl_jax.evaluation.vqa import PeopleAccuracy, PopeSubsets, VqaAccuracy

# The first name of a task's first metric is its main metric: it decides which
# checkpoint is best and whether a prediction counts as correct.
METRICS: Mapping[str, tuple[type[Metric], ...]] = {
  "caption": (CaptionMatch, SimpleCider),
  "vqa": (VqaAccuracy, PeopleAccuracy, PopeSubsets),
  "grounding": (BoxOverlap,),
  "entailment": (EntailmentAccuracy, EntailmentTable),
}
# Metrics of `Options.metrics="all"` only.
_SLOW: Mapping[str, tuple[type[Metric], ...]] = {"caption": (CocoFigures,)}


def make_metrics(task: str, options: Options) -> list[Metric]:
  """Returns the metrics of a task without any examples."""
  slow = _SLOW.get(task, ()) if options.metrics == "all" else ()
  return [metric(options) for metric in (*METRICS[task], *slow)]


def metric_names(task: str) -> list[str]:
  """Returns the names of a task's cheap results, the main metric first."""
  return [name for metric in METRICS[task] for name in metric.names]
