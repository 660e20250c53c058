"""Files of an evaluation in the run folder: reports, predictions, pictures."""

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
from narvl_jax.evaluation.saved.files import (
  EVALUATIONS_FOLDER,
  MAIN_FILE,
  PREDICTIONS_FOLDER,
)
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files import side_files
from narvl_jax.files.disk import replacing, write_json
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import warn

_PANELS_PER_TASK = 10


def make_way(workdir: pathlib.Path) -> None:
  """Sets aside files in the place of the results in a run folder.

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
  """Writes a report, its predictions and pages of pictures.

  The files are `evaluations/NAME.json`, `predictions/NAME.jsonl`,
  `predictions/NAME.png` and, if any answer is wrong,
  `predictions/NAME-mistakes.png`, the mistakes with the largest loss of every
  kind first; see `reporting.file_name`. The evaluation of the best checkpoint
  with the settings of the config also becomes `evaluation.json`, unless that
  has the same figures and those of all metrics.

  Args:
    experiment: experiment of the run; its data sets have the pictures.
    workdir: run folder.
    report: report of `evaluate_tasks`.
    predictions: those of `evaluate_tasks`.
    best: whether the checkpoint is the best one.

  Returns:
    The files, each written atomically.
  """
  folder = as_path(workdir)
  name = reporting.file_name(report)
  place = folder / PREDICTIONS_FOLDER
  paths = [
    folder / EVALUATIONS_FOLDER / f"{name}.json",
    place / f"{name}.jsonl",
  ]
  title = f"{folder.resolve().name}, {reporting.heading(report)}"
  pages = [(place / f"{name}.png", predictions, title)]
  wrong = mistakes(predictions)
  if wrong:
    headline = f"{len(wrong)} mistakes of {title}, the largest loss first"
    pages.append((place / f"{name}-mistakes.png", wrong, headline))
  make_way(folder)
  for path in (*paths, *(page[0] for page in pages)):
    side_files.make_way(path)
  # `inside`: a run folder that was removed is not created again.
  reporting.write_predictions(paths[1], predictions, inside=folder)
  # Before the pictures, which may fail.
  write_json(paths[0], report, inside=folder)
  note = _how_to_ask_again(experiment, folder, report["split"])
  for path, shown, text in pages:
    panels = prediction_panels(experiment, report["split"], shown)
    if panels or not shown:
      grid = rendering.prediction_grid(panels, title=text, note=note)
      paths.append(write_image(path, grid, inside=folder))
  main = folder / MAIN_FILE
  if (
    best and _is_main(experiment.config, report) and not _has_more(main, report)
  ):
    # Last, so that a program which waits for this file finds the others.
    paths.append(main)
    write_json(main, report, inside=folder)
  return paths


def mistakes(
  predictions: Sequence[reporting.Prediction],
) -> list[reporting.Prediction]:
  """Returns the wrong predictions, those with the largest loss first.

  The loss is that of the true answer. Large ones show wrong labels and
  systematic errors. Mistakes without a loss follow, the most confident first.
  """
  wrong = [x for x in predictions if x["correct"] is False]
  return sorted(
    wrong, key=lambda x: (-x.get("loss", -1.0), -reporting.confidence(x))
  )


def _how_to_ask_again(
  experiment: Experiment, folder: pathlib.Path, split: str
) -> str:
  """Returns the command that repeats the prediction of a panel."""
  text = (
    f"#N: python -m narvl_jax.predict --workdir={folder} --task=TASK"
    " --example=N"
  )
  if split != experiment.config.evaluation.split:
    text += f" --split={split}"
  return text


def _is_main(config: Any, report: reporting.Report) -> bool:
  """Returns whether a report has the settings of the config."""
  settings = config.evaluation
  return (
    report["split"] == settings.split
    and report["decoding_name"] == "greedy"
    and report["max_examples"] == (settings.max_examples or None)
    and report["only_tasks"] is None
    # Other references, whose figures have another scale.
    and not report.get("cider_df")
    and not report.get("annotations")
  )


def _has_more(path: pathlib.Path, report: reporting.Report) -> bool:
  """Returns whether a file has all metrics of the same evaluation."""
  stored = side_files.read_object(path)
  if stored is None or report.get("metrics") == "all":
    return False
  cheap = {**stored, "metrics": report.get("metrics")}
  return (
    stored.get("metrics") == "all"
    and reporting.file_name(cheap) == reporting.file_name(report)
    and all(
      figures.items() <= stored.get("tasks", {}).get(task, {}).items()
      for task, figures in report["tasks"].items()
    )
  )


def prediction_panels(
  experiment: Experiment,
  split: str,
  predictions: Sequence[reporting.Prediction],
  per_task: int = _PANELS_PER_TASK,
) -> list[rendering.Panel]:
  """Returns panels of some examples of every task and kind.

  Examples whose picture cannot be read any more are left out with a warning.
  """
  readers: dict[str, RecordReader] = {}
  panels = []
  for prediction in reporting.select_examples(predictions, per_task):
    name = prediction["dataset"]
    if name not in readers:
      source = experiment.dataset(name, split)
      readers[name] = RecordReader(source, name)
    others = [
      key
      for key, entry in experiment.config.data.evaluation.items()
      if entry.task == prediction["task"]
    ]
    # The first data set of a task is the default of `predict --example`.
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
  """Returns the panel of one prediction.

  Args:
    prediction: see `tally.describe`; "index" is optional.
    image: the picture.
    place: flags of `predict` that select the data set.
  """
  grounded = prediction["task"] == "grounding"
  # A box of zeros means "no box".
  box = as_box(prediction["prediction"]) if grounded else None
  answer = "no box"
  if box is None or any(box):
    answer = reporting.format_answer(prediction["prediction"])
  target = prediction["target"]
  kind = f" / {prediction['kind']}" if prediction["kind"] else ""
  number = f" {place}#{prediction['index']}" if "index" in prediction else ""
  iou = (prediction.get("scores") or {}).get("mean_iou")
  loss = f", loss {prediction['loss']:.3g}" if "loss" in prediction else ""
  width, height = images.original_size(image)
  return rendering.Panel(
    image=images.prepare_image(image, (height, width)),
    title=prediction["task"] + kind + number,
    prompt=prediction["prompt"],
    prediction=f"{answer} ({100 * reporting.confidence(prediction):.0f} %)"
    + ("" if iou is None else f", IoU {iou:.2f}"),
    target=None if target is None else reporting.format_answer(target) + loss,
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
  """Writes a PNG, atomically."""
  path = as_path(path)
  with replacing(path, inside=inside) as temporary:
    picture.save(temporary, format="PNG")
  return path
