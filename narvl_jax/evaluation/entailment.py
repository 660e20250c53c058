"""Score of visual entailment: accuracy over yes, no and maybe."""

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record


def score(prediction: str, record: Record) -> dict[str, float] | None:
  """Compares the label with the truth.

  Args:
    prediction: "yes", "no", "maybe", or whatever else was decoded.
    record: `answers` holds the true label.

  Returns:
    accuracy, 0 or 1; None if the truth is unknown.
  """
  answers = normalized_answers(record.answers)
  if not answers:
    return None
  return {"accuracy": float(normalize_answer(prediction) in answers)}
