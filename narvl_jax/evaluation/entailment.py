"""Metrics of visual entailment."""

from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record
from narvl_jax.data.tasks.entailment import ANSWERS
from narvl_jax.evaluation.metric import MeanMetric, Metric
from narvl_jax.metrics import bootstrap, classes


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


class EntailmentTable(Metric):
  """Confusion matrix; precision, recall and F1 of each label."""

  names = ()
  of_groups = False

  def measure(self, example: Record, prediction: str) -> list[str] | None:
    """Returns the answer and the true label."""
    truth = next(iter(normalized_answers(example.answers)), "")
    return [normalize_answer(prediction), truth] if truth in ANSWERS else None

  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns nothing: see `details`."""
    del measured
    return {}

  def details(self, measured: Sequence[Any]) -> dict[str, Any]:
    """Returns {"confusion": classes, counts, per_class}.

    Rows of the counts are true labels, columns the answers; the last column
    counts answers that are not a label. A division by zero is None.
    """
    answers, truths = zip(*measured, strict=True)
    table = classes.confusion(answers, truths, ANSWERS)
    return {
      "confusion": {
        "classes": list(table.classes),
        "counts": table.counts.tolist(),
        "per_class": {
          label: {k: None if x != x else x for k, x in figures.items()}
          for label, figures in table.per_class().items()
        },
      }
    }

  def detail_samples(
    self, pictures: Mapping[int, str]
  ) -> dict[tuple[str, ...], dict[str, bootstrap.Sample]]:
    """Returns the samples of precision, recall and F1 of each label."""
    known = self.known()
    groups = [pictures[i] for i in known]
    found = {}
    for label in ANSWERS if known else ():
      answers, truths = zip(*known.values(), strict=True)
      samples = classes.binary_samples(answers, truths, label, groups)
      names = "precision", "recall", "f1"
      path = "confusion", "per_class", label
      found[path] = {name: samples[name] for name in names}
    return found
