"""Score of an answer to a question: the soft VQA accuracy."""

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record


def score(prediction: str, record: Record) -> dict[str, float] | None:
  """Looks the answer up among the valid ones.

  Args:
    prediction: the answer.
    record: `answers` maps valid answers to scores in (0, 1]; those of several
      annotators have been scored by `answer_text.annotator_scores`.

  Returns:
    accuracy, 0 for an answer that is not listed; None if none is listed.
  """
  answers = normalized_answers(record.answers)
  if not answers:
    return None
  return {"accuracy": float(answers.get(normalize_answer(prediction), 0.0))}
