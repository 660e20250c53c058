"""Metrics of answers to questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.data.answer_text import normalize_answer, normalized_answers
from narvl_jax.data.example import Record
from narvl_jax.evaluation.metric import MeanMetric, Metric
from narvl_jax.metrics import bootstrap, classes
from narvl_jax.metrics.vqa import RULES

# The subsets of POPE, as kinds of records.
POPE_KINDS = ("random", "popular", "adversarial")


class VqaAccuracy(MeanMetric):
  """Soft VQA accuracy with the scores of `answer_text.annotator_scores`."""

  names = ("accuracy",)

  def measure(
    self, example: Record, prediction: str
  ) -> dict[str, float] | None:
    """Returns the score of the answer, 0 for one that is not listed."""
    answers = normalized_answers(example.answers)
    if not answers:
      return None
    return {"accuracy": float(answers.get(normalize_answer(prediction), 0.0))}


class PeopleAccuracy(MeanMetric):
  """Accuracy against the answers of people by an official rule.

  The rule is `evaluation.vqa_rule`. Records without `people` have no score.
  """

  names = ("vqa_accuracy",)

  def measure(
    self, example: Record, prediction: str
  ) -> dict[str, float] | None:
    """Returns the accuracy of the answer."""
    if not example.people:
      return None
    rule = RULES[self.options.vqa_rule]
    return {"vqa_accuracy": rule(prediction, example.people)}


class PopeSubsets(Metric):
  """The figures of POPE for each of its subsets, which are kinds of records."""

  names = ()
  of_groups = False

  def measure(self, example: Record, prediction: str) -> list[str] | None:
    """Returns kind, answer and truth of a question of POPE."""
    truth = next(iter(normalized_answers(example.answers)), "")
    if example.kind not in POPE_KINDS or truth not in ("yes", "no"):
      return None
    return [example.kind, prediction, truth]

  def reduce(self, measured: Sequence[Any]) -> dict[str, float]:
    """Returns nothing: see `details`."""
    del measured
    return {}

  def details(self, measured: Sequence[Any]) -> dict[str, Any]:
    """Returns {"pope": subset -> figures}; None for a division by zero."""
    found = {}
    for kind in POPE_KINDS:
      pairs = [(said, truth) for of, said, truth in measured if of == kind]
      if pairs:
        figures = classes.pope(*zip(*pairs, strict=True))
        found[kind] = {"examples": len(pairs)} | {
          name: None if x != x else x for name, x in figures.items()
        }
    return {"pope": found}

  def detail_samples(
    self, pictures: Mapping[int, str]
  ) -> dict[tuple[str, ...], dict[str, bootstrap.Sample]]:
    """Returns those of each subset."""
    found = {}
    for kind in POPE_KINDS:
      own = {i: x for i, x in self.known().items() if x[0] == kind}
      if own:
        said = (classes.polled(x[1]) for x in own.values())
        found["pope", kind] = classes.binary_samples(
          said, (x[2] for x in own.values()), "yes", [pictures[i] for i in own]
        )
    return found
