"""The metrics of every task."""

from collections.abc import Mapping

from narvl_jax.evaluation.caption import CaptionMatch
from narvl_jax.evaluation.entailment import EntailmentAccuracy
from narvl_jax.evaluation.grounding import BoxOverlap
from narvl_jax.evaluation.metric import Metric
from narvl_jax.evaluation.vqa import VqaAccuracy

# The first name of a task's first metric is its main metric: it decides which
# checkpoint is best and whether a prediction counts as correct.
METRICS: Mapping[str, tuple[type[Metric], ...]] = {
  "caption": (CaptionMatch,),
  "vqa": (VqaAccuracy,),
  "grounding": (BoxOverlap,),
  "entailment": (EntailmentAccuracy,),
}


def metric_names(task: str) -> list[str]:
  """Returns the names of a task's results, the main metric first."""
  return [name for metric in METRICS[task] for name in metric.names]
