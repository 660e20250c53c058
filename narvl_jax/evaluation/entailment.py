"""Score of visual entailment: accuracy over yes, no and maybe."""

from narvl_jax.data.example import Record


def score(prediction: str, record: Record) -> dict[str, float] | None:
  """Compares the label with the truth.

  Args:
    prediction: "yes", "no", "maybe", or whatever else was decoded.
    record: `answers` holds the true label.

  Returns:
    accuracy, 0 or 1; None if the truth is unknown.
  """
  if not record.answers:
    return None
  return {"accuracy": float(prediction.strip() in record.answers)}
