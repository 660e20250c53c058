"""The result of `predict`, as JSON and as text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import rendering
from narvl_jax.evaluation import reporting, tally
from narvl_jax.prediction.predictor import Answer

Outcome = dict[str, Any]


def format_outcome(outcome: Outcome) -> str:
  """Returns the lines that `predict` prints."""
  answer, grounded = outcome["answer"], outcome["task"] == "grounding"
  if grounded:
    shown = "none, the model gave no complete box"
    if answer is not None:
      shown = f"{format_box(answer)} (x0, y0, x1, y1 in pixels)"
  else:
    shown = reporting.format_answer(answer)
  if outcome.get("abstained"):
    shown = (
      f"withheld: right with probability {100 * outcome['confidence']:.1f} %,"
      f" below --min_probability={outcome['min_probability']:g}"
    )
  rows = [
    ("image", outcome["image"]),
    ("prompt", outcome["prompt"]),
    ("box" if grounded else outcome["task"], shown),
    ("probability", f"{100 * outcome['probability']:.1f} %"),
  ]
  for key, label in (
    ("raw_probability", "raw"),
    ("probability_iou50", "IoU >= 0.5"),
  ):
    if key in outcome:
      rows.append((label, f"{100 * outcome[key]:.1f} %"))
  for other in outcome.get("alternatives", ()):
    value = other["answer"]
    text = format_box(value) if grounded else reporting.format_answer(value)
    rows.append(("or", f"{text} ({100 * other['probability']:.1f} %)"))
  truth = outcome.get("truth")
  if truth is not None:
    rows.append(("truth", format_box(truth) if grounded else truth))
  if "overlay" in outcome:
    rows.append(("overlay", outcome["overlay"]))
  return "\n".join(f"{key + ':':<13}{value}" for key, value in rows if value)


def withhold(outcome: Outcome, answer: Answer, min_probability: float) -> None:
  """Removes an answer whose confidence is below a threshold in [0, 1]."""
  outcome["min_probability"] = min_probability
  outcome["confidence"] = answer.confidence
  outcome["abstained"] = answer.confidence < min_probability
  if outcome["abstained"]:
    outcome["answer"] = None
    outcome.pop("alternatives", None)


def plain_answer(answer: Answer) -> Outcome:
  """Returns answer, probability and truth (if known) as JSON can hold them."""
  described = tally.describe(answer)
  # A box of zeros means "no box".
  no_box = answer.record.task == "grounding" and not any(answer.value)
  plain = {
    "answer": None if no_box else described["prediction"],
    **tally.probabilities(answer),
  }
  if answer.query_entropy:
    plain["query_entropy"] = list(answer.query_entropy)
  if answer.alternatives:
    plain["alternatives"] = [
      {
        "answer": value if isinstance(value, str) else list(value),
        "probability": math.exp(log_prob),
      }
      for value, log_prob in answer.alternatives
    ]
  if described["target"] is not None:
    plain["truth"] = described["target"]
  return plain


def overlay(answer: Answer) -> Image.Image:
  """Returns the picture of a grounded expression with its box."""
  assert isinstance(answer.record.image, np.ndarray)
  assert not isinstance(answer.value, str)
  record, box = answer.record, answer.value
  shown = format_box(box) if any(box) else "no box"
  return rendering.box_overlay(
    answer.record.image,
    box if any(box) else None,
    target_box=record.box,
    caption=f"{record.prompt}: {shown} ({100 * answer.confidence:.0f} %)",
  )


def picture(record: Record) -> Image.Image:
  """Returns the picture of a record that has been decoded."""
  assert isinstance(record.image, np.ndarray)
  return Image.fromarray(record.image)


def format_box(box: Sequence[float]) -> str:
  """Returns a box in pixels with one decimal."""
  return ", ".join(f"{x:.1f}" for x in box)
