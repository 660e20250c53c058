"""Score of an answer to a question: the soft VQA accuracy."""

from narvl_jax.data.example import Record


def score(prediction: str, record: Record) -> dict[str, float] | None:
  """Looks the answer up among the valid ones.

  Args:
    prediction: the answer.
    record: `answers` maps valid answers to scores in (0, 1].

  Returns:
    accuracy, 0 for an answer that is not listed; None if none is listed.
  """
  if not record.answers:
    return None
  return {"accuracy": float(record.answers.get(prediction.strip(), 0.0))}
