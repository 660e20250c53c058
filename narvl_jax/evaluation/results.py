"""The files that an evaluation leaves in the run folder."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.example import Box, Record
from narvl_jax.data.pictures import images, rendering
from narvl_jax.errors import UserError
from narvl_jax.evaluation import reporting
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files import side_files
from narvl_jax.files.disk import replacing
from narvl_jax.terminal.text import warn

# The evaluation by the run's own settings, of its best checkpoint.
MAIN_FILE = "evaluation.json"
EVALUATIONS_FOLDER = "evaluations"
PREDICTIONS_FOLDER = "predictions"
_PANELS_PER_TASK = 10


def make_way(workdir: pathlib.Path) -> None:
  """Sets aside what would keep an evaluation from writing its results.

  Args:
    workdir: run folder.

  Raises:
    UserError: it cannot be moved.
  """
  try:
    side_files.make_way(workdir / MAIN_FILE)
    for name in (EVALUATIONS_FOLDER, PREDICTIONS_FOLDER):
      side_files.make_way(workdir / name, folder=True)
  except OSError as error:
    raise UserError(
      f'"{error.filename}" is in the place of results and cannot be moved:'
      f" {error.strerror}; remove it"
    ) from error


def write_results(
  experiment: Experiment,
  workdir: str | os.PathLike[str],
  report: reporting.Report,
  predictions: Sequence[reporting.Prediction],
  *,
  best: bool = True,
) -> list[pathlib.Path]:
  """Writes a report, predictions and a page of pictures into a run folder.

  They are `evaluations/NAME.json`, `predictions/NAME.jsonl`,
  `predictions/NAME.png` and, if there are wrong answers,
  `predictions/NAME-mistakes.png` with nothing else; NAME is that of
  `reporting.file_name`, so that no evaluation replaces a different one. The
  evaluation by the run's own settings and of its best checkpoint also becomes
  `evaluation.json`.

  Args:
    experiment: opens the data sets again for their pictures.
    workdir: run folder.
    report: of `evaluator.evaluate_tasks`.
    predictions: likewise.
    best: whether the checkpoint is the one that is chosen by default.

  Returns:
    The files, each of which is complete or was not touched.
  """
  folder = pathlib.Path(workdir)
  split = report["split"]
  name = reporting.file_name(report)
  paths = [
    folder / EVALUATIONS_FOLDER / f"{name}.json",
    folder / PREDICTIONS_FOLDER / f"{name}.jsonl",
    folder / PREDICTIONS_FOLDER / f"{name}.png",
  ]
  make_way(folder)
  for path in paths:
    side_files.make_way(path)
  # A run folder that is gone is not made again.
  reporting.write_predictions(paths[1], predictions, inside=folder)
  # Before the pictures, which may fail: what was computed is kept.
  reporting.write_json(paths[0], report, inside=folder)
  title = f"{folder.resolve().name}, {reporting.heading(report)}"
  again = _how_to_ask_again(experiment, folder, split)
  pages = [(paths[2], predictions, title)]
  wrong = [x for x in predictions if x["correct"] is False]
  if wrong:
    paths.append(folder / PREDICTIONS_FOLDER / f"{name}-mistakes.png")
    side_files.make_way(paths[-1])
    pages.append((paths[-1], wrong, f"{len(wrong)} mistakes of {title}"))
  for path, shown, text in pages:
    panels = prediction_panels(experiment, split, shown)
    if shown and not panels:
      paths.remove(path)
      continue
    grid = rendering.prediction_grid(panels, title=text, note=again)
    write_image(path, grid, inside=folder)
  if best and _is_main(experiment.config, report):
    # Last: who waits for this file finds the others.
    paths.append(folder / MAIN_FILE)
    reporting.write_json(paths[-1], report, inside=folder)
  return paths


def _how_to_ask_again(
  experiment: Experiment, folder: pathlib.Path, split: str
) -> str:
  """Returns the command that asks for the answer of a cell."""
  text = (
    f"#N: python -m narvl_jax.predict --workdir={folder} --task=TASK"
    " --example=N"
  )
  if split != experiment.config.evaluation.split:
    text += f" --split={split}"
  return text


def _is_main(config: Any, report: reporting.Report) -> bool:
  """Returns whether a report is of what the config says."""
  settings = config.evaluation
  return (
    report["split"] == settings.split
    and report["decoding_name"] == "greedy"
    and report["max_examples"] == (settings.max_examples or None)
    and report["only_tasks"] is None
  )


def prediction_panels(
  experiment: Experiment,
  split: str,
  predictions: Sequence[reporting.Prediction],
  per_task: int = _PANELS_PER_TASK,
) -> list[rendering.Panel]:
  """Returns panels of some examples of every task and kind.

  One whose picture cannot be read any more is left out with a warning.
  """
  readers: dict[str, RecordReader] = {}
  panels = []
  for prediction in reporting.select_examples(predictions, per_task):
    name = prediction["dataset"]
    if name not in readers:
      source = load_dataset(experiment.config, name, split)
      readers[name] = RecordReader(source, name)
    others = [
      key
      for key, entry in experiment.config.data.evaluation.items()
      if entry.task == prediction["task"]
    ]
    # `predict --example` reads the first one by default.
    shown = "" if name == others[0] else f"--dataset={name} "
    draw = functools.partial(_panel_of_record, prediction, shown)
    panel = readers[name].read(prediction["index"], draw)
    if isinstance(panel, BadRecord):
      warn(f"left out of the pictures: {panel.what}")
    else:
      panels.append(panel)
  return panels


def _panel_of_record(
  prediction: reporting.Prediction, place: str, record: Record
) -> rendering.Panel:
  return make_panel(prediction, record.image, place=place)


def make_panel(
  prediction: reporting.Prediction,
  image: bytes | np.ndarray,
  *,
  place: str = "",
) -> rendering.Panel:
  """Returns the panel of one prediction about a picture.

  Args:
    prediction: of `evaluator.describe`, maybe with its "index".
    image: the picture.
    place: what `predict` needs besides the index to find it.
  """
  grounded = prediction["task"] == "grounding"
  # All zero: the model gave no box.
  box = as_box(prediction["prediction"]) if grounded else None
  answer = "no box"
  if box is None or any(box):
    answer = reporting.format_answer(prediction["prediction"])
  target = prediction["target"]
  kind = f" / {prediction['kind']}" if prediction["kind"] else ""
  number = f" {place}#{prediction['index']}" if "index" in prediction else ""
  iou = (prediction.get("scores") or {}).get("mean_iou")
  width, height = images.original_size(image)
  return rendering.Panel(
    image=images.prepare_image(image, (height, width)),
    title=prediction["task"] + kind + number,
    prompt=prediction["prompt"],
    prediction=f"{answer} ({100 * prediction['probability']:.0f} %)"
    + ("" if iou is None else f", IoU {iou:.2f}"),
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
  path: str | os.PathLike[str],
  picture: Image.Image,
  *,
  inside: pathlib.Path | None = None,
) -> pathlib.Path:
  """Writes a PNG; readers see the old or the new file, never a part."""
  path = pathlib.Path(path)
  with replacing(path, inside=inside) as temporary:
    picture.save(temporary, format="PNG")
  return path
