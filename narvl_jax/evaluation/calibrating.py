"""Fits temperatures to the predictions of an evaluation, and draws them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from narvl_jax.evaluation.reporting import Prediction, confidence
from narvl_jax.metrics.calibration import (
  Reliability,
  abstention,
  apply_temperature,
  chance_error,
  fit_temperature,
  is_better,
  reliability,
)
from narvl_jax.terminal.tables import format_columns

_ACCURACIES = (0.9, 0.95, 0.99)
_SIDE = 240
_MARGIN = 44
_INK, _FAINT, _BAR = (32, 33, 36), (150, 154, 160), (0, 98, 204)


def by_task(
  predictions: Sequence[Prediction],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns confidence and correctness of the predictions of each task.

  Correctness is the score of the task's main metric, in [0, 1]; predictions
  without ground truth are left out. The confidence of a box is that of an
  overlap of 0.5.
  """
  pairs: dict[str, list[tuple[float, float]]] = {}
  for prediction in predictions:
    scores = prediction["scores"]
    if scores:
      pair = confidence(prediction), next(iter(scores.values()))
      pairs.setdefault(prediction["task"], []).append(pair)
  columns = {task: np.asarray(of).T for task, of in pairs.items()}
  return {task: (of[0], of[1]) for task, of in columns.items()}


def fit(probabilities: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
  """Returns the entry of one task, see `prediction.calibration`.

  Args:
    probabilities: [examples] in [0, 1].
    correct: [examples] in [0, 1].
  """
  temperature = fit_temperature(probabilities, correct)
  if not is_better(probabilities, correct, temperature):
    temperature = 1.0
  after = apply_temperature(probabilities, temperature)
  thresholds = {}
  for accuracy in _ACCURACIES:
    found = abstention(after, correct, accuracy)
    thresholds[str(accuracy)] = found and dataclasses.asdict(found)
  return {
    "temperature": temperature,
    "examples": len(correct),
    "ece_before": reliability(probabilities, correct).error,
    "ece_after": reliability(after, correct).error,
    "ece_by_chance": chance_error(after),
    "thresholds": thresholds,
  }


def format_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table of the entries: errors, and coverage at each accuracy."""
  wanted = [f"answered at {100 * x:.0f} %" for x in _ACCURACIES]
  rows = [
    (
      *("task", "examples", "temperature", "ECE before", "ECE after"),
      *("by chance", *wanted),
    )
  ]
  for task, found in tasks.items():
    shown = [
      "-" if x is None else f"{100 * x['coverage']:.1f} %"
      for x in found["thresholds"].values()
    ]
    rows.append(
      (
        task,
        str(found["examples"]),
        f"{found['temperature']:.2f}",
        f"{100 * found['ece_before']:.1f} %",
        f"{100 * found['ece_after']:.1f} %",
        f"{100 * found['ece_by_chance']:.1f} %",
        *shown,
      )
    )
  return format_columns(rows)


def draw(
  measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
  temperatures: Mapping[str, float],
) -> Image.Image:
  """Returns reliability diagrams, before and after, a row a task.

  A task with the temperature 1, which changes nothing, has one diagram.

  Args:
    measured: see `by_task`.
    temperatures: temperatures of the same tasks.
  """
  cell = _SIDE + 2 * _MARGIN
  columns = 1 if all(temperatures[task] == 1 for task in measured) else 2
  size = (columns * cell, max(len(measured), 1) * cell)
  picture = Image.new("RGB", size, (255, 255, 255))
  pen = ImageDraw.Draw(picture)
  for row, (task, (raw, correct)) in enumerate(measured.items()):
    temperature = temperatures[task]
    if temperature == 1:
      versions = {"temperature 1": raw}
    else:
      after = apply_temperature(raw, temperature)
      versions = {
        "before": raw,
        f"after (temperature {temperature:.2f})": after,
      }
    for column, (name, values) in enumerate(versions.items()):
      corner = column * cell + _MARGIN, row * cell + _MARGIN
      found = reliability(values, correct)
      title = f"{task}, {name}: ECE {100 * found.error:.1f} %"
      _draw_diagram(pen, corner, found, title)
  return picture


def _draw_diagram(
  pen: ImageDraw.ImageDraw,
  corner: tuple[int, int],
  found: Reliability,
  title: str,
) -> None:
  """Draws accuracy over probability as bars, and the diagonal."""
  left, top = corner
  bottom, width = top + _SIDE, _SIDE / len(found.count)
  font = ImageFont.load_default(13)
  pen.text((left, top - 22), title, fill=_INK, font=font)
  for k, (accuracy, count) in enumerate(
    zip(found.accuracy, found.count, strict=True)
  ):
    if count:
      box = (
        round(left + k * width) + 1,
        round(bottom - accuracy * _SIDE),
        round(left + (k + 1) * width) - 1,
        bottom,
      )
      pen.rectangle(box, fill=_BAR)
  pen.rectangle((left, top, left + _SIDE, bottom), outline=_FAINT)
  pen.line((left, bottom, left + _SIDE, top), fill=_INK)
  pen.text((left, bottom + 4), "0", fill=_INK, font=font)
  pen.text((left + 80, bottom + 4), "probability", fill=_INK, font=font)
  pen.text((left + _SIDE - 6, bottom + 4), "1", fill=_INK, font=font)
  pen.text((left - 40, top), "right", fill=_INK, font=font)
