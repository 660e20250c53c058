"""Metric of answers to questions."""

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record
from narvl_jax.evaluation.metric import MeanMetric


class VqaAccuracy(MeanMetric):
  """Soft VQA accuracy; `answer_text.annotator_scores` made the scores."""

  names = ("accuracy",)

  def measure(
    self, example: Record, prediction: str
  ) -> dict[str, float] | None:
    """Returns the score of the answer, 0 for one that is not listed."""
    answers = normalized_answers(example.answers)
    if not answers:
      return None
    return {"accuracy": float(answers.get(normalize_answer(prediction), 0.0))}
