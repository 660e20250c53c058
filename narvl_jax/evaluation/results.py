"""The files that an evaluation leaves in the run folder."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from narvl_jax.data import images
from narvl_jax.data.example import Box
from narvl_jax.datasets import load_dataset
from narvl_jax.disk import replacing
from narvl_jax.evaluation import rendering, reporting
from narvl_jax.experiment import Experiment

_PANELS_PER_TASK = 10


def write_results(
  experiment: Experiment,
  workdir: str | os.PathLike[str],
  report: reporting.Report,
  predictions: Sequence[reporting.Prediction],
) -> list[pathlib.Path]:
  """Writes evaluation.json, predictions/SPLIT.jsonl and predictions/SPLIT.png.

  Args:
    experiment: opens the data sets again for their pictures.
    workdir: run folder.
    report: of `evaluator.evaluate_tasks`.
    predictions: likewise.

  Returns:
    The files, each of which is complete or was not touched.
  """
  folder = pathlib.Path(workdir)
  split = report["split"]
  paths = [
    folder / "evaluation.json",
    folder / "predictions" / f"{split}.jsonl",
    folder / "predictions" / f"{split}.png",
  ]
  reporting.write_predictions(paths[1], predictions)
  title = f"{folder.resolve().name}, {split}, {report['examples']} examples"
  if report["step"] is not None:
    title += f", step {report['step']}"
  grid = rendering.prediction_grid(
    prediction_panels(experiment, split, predictions), title=title
  )
  write_image(paths[2], grid)
  # Last: who waits for this file finds the others.
  reporting.write_json(paths[0], report)
  return paths


def prediction_panels(
  experiment: Experiment,
  split: str,
  predictions: Sequence[reporting.Prediction],
  per_task: int = _PANELS_PER_TASK,
) -> list[rendering.Panel]:
  """Returns panels of some examples of every task and kind."""
  datasets = {}
  panels = []
  for prediction in reporting.select_examples(predictions, per_task):
    name = prediction["dataset"]
    if name not in datasets:
      datasets[name] = load_dataset(experiment.config, name, split)
    image = datasets[name][prediction["index"]].image
    panels.append(make_panel(prediction, image))
  return panels


def make_panel(
  prediction: reporting.Prediction, image: bytes | np.ndarray
) -> rendering.Panel:
  """Returns the panel of one prediction about a picture."""
  grounded = prediction["task"] == "grounding"
  # All zero: the model gave no box.
  box = as_box(prediction["prediction"]) if grounded else None
  answer = "no box"
  if box is None or any(box):
    answer = reporting.format_answer(prediction["prediction"])
  target = prediction["target"]
  kind = f" / {prediction['kind']}" if prediction["kind"] else ""
  width, height = images.original_size(image)
  return rendering.Panel(
    image=images.prepare_image(image, (height, width)),
    title=prediction["task"] + kind,
    prompt=prediction["prompt"],
    prediction=f"{answer} ({100 * prediction['probability']:.0f} %)",
    target=None if target is None else reporting.format_answer(target),
    correct=prediction["correct"],
    predicted_box=box if box and any(box) else None,
    target_box=as_box(target) if grounded and target is not None else None,
  )


def as_box(values: Sequence[float]) -> Box:
  """Returns four numbers as a box."""
  x0, y0, x1, y1 = values
  return x0, y0, x1, y1


def write_image(
  path: str | os.PathLike[str], picture: Image.Image
) -> pathlib.Path:
  """Writes a PNG; readers see the old or the new file, never a part."""
  path = pathlib.Path(path)
  with replacing(path) as temporary:
    picture.save(temporary, format="PNG")
  return path
