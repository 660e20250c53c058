"""Metric of visual entailment."""

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record
from narvl_jax.evaluation.metric import MeanMetric


class EntailmentAccuracy(MeanMetric):
  """Accuracy over the labels yes, no and maybe."""

  names = ("accuracy",)

  def measure(
    self, example: Record, prediction: str
  ) -> dict[str, float] | None:
    """Returns whether the label is the true one."""
    answers = normalized_answers(example.answers)
    if not answers:
      return None
    return {"accuracy": float(normalize_answer(prediction) in answers)}
