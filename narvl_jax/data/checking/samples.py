"""Draws some records as the model reads them, for `narvl_jax.check_data`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images, rendering
from narvl_jax.data.tasks import Task

_SAMPLES = 5
_SAMPLE_SIDE = 512
_WORDS = rendering.Words(
  "read back", "data", "box of the target, read back", "box of the data"
)


def draw_samples(
  name: str,
  source: Sequence[Record],
  task: Task[Any],
  good: Sequence[int],
  size: tuple[int, int],
) -> Image.Image | None:
  """Draws (RGB) some good records as the model reads them; None without any.

  Args:
    good: indices of good records.
    size: (height, width) in pixels of the model's input.
  """
  chosen = good[:: max(1, len(good) // _SAMPLES)][:_SAMPLES]
  reader = RecordReader(source, name)
  panels = []
  for index in chosen:
    panel = reader.read(index, lambda record: _panel(record, task, size))
    # A bad record changed since the inspection.
    if not isinstance(panel, BadRecord):
      panels.append(panel)
  if not panels:
    return None
  text = f"{name}: resized to {size[1]} x {size[0]} pixels and back"
  if task.name == "grounding":
    text += "; boxes are x0, y0, x1, y1 in pixels of the original"
  return rendering.prediction_grid(panels, title=text, words=_WORDS)


def _panel(
  record: Record, task: Task[Any], size: tuple[int, int]
) -> rendering.Panel:
  has_target = bool(record.answers) or record.box is not None
  encoded = task.encode(record, with_target=has_target)
  width, height = images.original_size(record.image)
  factor = min(1.0, _SAMPLE_SIDE / max(width, height))
  shown = (max(1, round(width * factor)), max(1, round(height * factor)))
  picture = Image.fromarray(images.prepare_image(record.image, size))
  back = np.asarray(picture.resize(shown, Image.Resampling.BICUBIC))
  labels = encoded.label_ids
  if task.settings.eos:
    labels = labels[:-1]
  answer = task.decode(labels, (width, height)) if labels else "(no target)"
  panel = rendering.Panel(
    image=back,
    title=f"{task.name} / {record.kind or record.id}",
    prompt=task.vocabulary.decode(encoded.text_ids).strip(),
    prediction=str(answer),
    target=" | ".join(f"{a} ({s:g})" for a, s in record.answers.items()),
  )
  if record.box is None or not isinstance(answer, tuple):
    return panel
  x, y = shown[0] / width, shown[1] / height
  read_back, box = (
    (b[0] * x, b[1] * y, b[2] * x, b[3] * y) for b in (answer, record.box)
  )
  return dataclasses.replace(
    panel,
    prediction=_format_box(answer),
    target=_format_box(record.box),
    predicted_box=read_back,
    target_box=box,
  )


def _format_box(box: Sequence[float]) -> str:
  return ", ".join(f"{value:.1f}" for value in box)
