r"""Asks a trained run about one picture.

python -m narvl_jax.predict --workdir=runs/shapes --image=photo.jpg \
    --task=vqa --prompt="what color is the circle?"

Prints the answer and its probability; for grounding the box in pixels of the
picture, and writes the picture with the box (--overlay=FILE.png). Captions
need no prompt. `--example=INDEX` instead of `--image` takes picture and prompt
from the run's own test data, saves the picture, and prints the truth, too.
`--json` prints one JSON object; `--decoding=beam --num_best=3` more answers.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_json
from narvl_jax.data.answer_text import checked_text
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images, rendering
from narvl_jax.data.record_checks import checked_record
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation import outcomes, results
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.files.paths import check_file
from narvl_jax.prediction import decoding_flags, foreign_input
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.prediction.predictor import Answer, Predictor
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show


def predict(
  workdir: str | os.PathLike[str],
  *,
  task: str | None = None,
  image: str | os.PathLike[str] | None = None,
  example: int | None = None,
  dataset: str = "",
  split: str = "",
  prompt: str | None = None,
  premise: str | None = None,
  overlay: str | os.PathLike[str] | None = None,
  checkpoint: str | int = "best",
  decoding: Mapping[str, Any] | None = None,
  answers: str = "",
) -> outcomes.Outcome:
  """Answers one request; exactly one of `image` and `example` is given.

  Args:
    workdir: run folder.
    task: one of the run's tasks; may be left out if there is only one.
    image: picture file; see docs/data.md.
    example: index of a record of the run's test data.
    dataset: entry of `data.evaluation` that has it; the task's first one if "".
    split: of that data set; `evaluation.split` if "".
    prompt: question, expression or hypothesis; with `example` its own prompt
      by default. Captions ignore it.
    premise: entailment only: what else is known about the picture.
    overlay: grounding only: PNG to write; by default in the run folder.
    checkpoint: "best", "last" or a step.
    decoding: see `decoding_flags.decodings_for`.
    answers: file of the answers that constrained VQA allows; that of the
      config if "".

  Returns:
    step, task, image (path), prompt, answer (text; grounding: box in pixels of
    the picture, None if the model gave no box), probability; with
    `num_best` above 1 also alternatives (answer and probability, best first);
    with `example` also truth; for grounding also overlay (path); warnings
    (sentences about what the model was not trained for).

  Raises:
    UserError: run, picture, task or prompt is wrong or missing.
  """
  if (image is None) == (example is None):
    raise UserError(
      "give a picture: either --image=FILE or --example=INDEX of the test data"
    )
  # What can be wrong is checked before the weights are read.
  if overlay is not None:
    check_file("--overlay", overlay)
  folder = pathlib.Path(workdir) / results.PREDICTIONS_FOLDER
  config = workdir_lib.read_config(pathlib.Path(workdir))
  results.make_way(pathlib.Path(workdir))
  name = _choose_task(list(config.tasks), task)
  if image is not None:
    path = pathlib.Path(image)
    picture = read_picture(path, config.data.exif_orientation)
    record = Record(path.name, name, picture)
  else:
    path = folder / f"example_{name}_{example}.png"
    record = _load_example(config, name, example or 0, dataset, split)
  if prompt is not None or premise is not None:
    record = _with_text(record, prompt, premise)
  if name == "caption":
    record = dataclasses.replace(record, prompt="")
  _check_length(record, config.tasks[name])
  experiment, variables, step = load_run(workdir, checkpoint)
  if answers:
    experiment = with_answers(experiment, answers)
  decodings = decoding_flags.decodings_for(experiment, decoding)
  decoding_flags.check_answers_heeded({name: decodings[name]}, answers)
  with progress.doing("compiling the model and answering"):
    answer = Predictor(experiment, variables, decodings).answer(record)

  if image is None:
    results.write_image(path, Image.fromarray(_pixels(record)))
  outcome: outcomes.Outcome = {
    "step": step,
    "task": name,
    "image": str(path),
    "prompt": record.prompt,
    **outcomes.plain_answer(answer),
  }
  if name == "grounding":
    target = folder / f"overlay_{path.stem}.png"
    target = target if overlay is None else pathlib.Path(overlay)
    outcome["overlay"] = str(_write_overlay(target, answer))
  outcome["warnings"] = foreign_input.warnings_about(
    experiment, record, resized=image is not None
  )
  return outcome


def read_picture(
  path: str | os.PathLike[str], exif_orientation: str = "ignore"
) -> np.ndarray:
  """Returns a picture file as uint8 [H, W, 3], in its own size.

  Args:
    path: regular file.
    exif_orientation: "ignore" or "apply"; see `data.exif_orientation`.

  Raises:
    UserError: the file is missing, or no complete picture.
  """
  data = images.read_image_file(path)
  data = images.with_orientation(data, exif_orientation)
  try:
    width, height = images.original_size(data)
    return images.prepare_image(data, (height, width))
  except UserError as error:
    raise UserError(f'--image="{os.fspath(path)}": {error}') from error


def _choose_task(tasks: Sequence[str], wanted: str | None) -> str:
  if wanted is None and len(tasks) == 1:
    return tasks[0]
  if wanted is None or wanted not in tasks:
    seen = "no task was given" if wanted is None else f'unknown task "{wanted}"'
    hint = did_you_mean(wanted or "", tasks)
    raise UserError(f"{seen}.{hint} Set --task.")
  return wanted


def _load_example(
  config: Any, task: str, index: int, dataset: str, split: str
) -> Record:
  """Returns a record of the test data with its picture decoded."""
  split = split or config.evaluation.split
  names = [k for k, v in config.data.evaluation.items() if v.task == task]
  if dataset and dataset not in names:
    raise UserError(
      f'data.evaluation has no "{dataset}" for the task {task}.'
      f"{did_you_mean(dataset, names)} (--dataset)"
    )
  names = [dataset] if dataset else names
  if not names:
    raise UserError(
      f'this run has no {split} data for "{task}"; pass a picture with --image'
    )
  source = load_dataset(config, names[0], split)
  if not 0 <= index < len(source):
    nearest = min(max(index, 0), len(source) - 1)
    raise UserError(
      f"--example={index} is outside of the {len(source)} records of"
      f' {split} data "{names[0]}"; nearest valid: --example={nearest}'
    )
  record = checked_record(source[index])
  width, height = images.original_size(record.image)
  pixels = images.prepare_image(record.image, (height, width))
  return dataclasses.replace(record, image=pixels)


def _with_text(
  record: Record, prompt: str | None, premise: str | None
) -> Record:
  """Returns the same picture with another request, of unknown truth."""
  return dataclasses.replace(
    record,
    prompt=record.prompt if prompt is None else prompt,
    premise=record.premise if premise is None else premise,
    answers={},
    box=None,
  )


def _check_length(record: Record, settings: Mapping[str, Any]) -> None:
  """Refuses what has no tokens, and words that would be cut off silently."""
  limit = settings.get("max_source_words", 0)
  for flag in ("prompt", "premise"):
    try:
      words = len(checked_text(getattr(record, flag)).split())
    except UserError as error:
      raise UserError(f"--{flag}: {error}") from error
    if limit and words > limit:
      raise UserError(
        f"--{flag} has {words} words, the run reads at most {limit}; shorten"
        f" it, or train with --config.tasks.{record.task}.max_source_words="
        f"{words}"
      )


def _write_overlay(path: pathlib.Path, answer: Answer) -> pathlib.Path:
  assert not isinstance(answer.value, str)
  record, box = answer.record, answer.value
  shown = outcomes.format_box(box) if any(box) else "no box"
  picture = rendering.box_overlay(
    _pixels(record),
    box if any(box) else None,
    target_box=record.box,
    caption=f"{record.prompt}: {shown} ({100 * answer.probability:.0f} %)",
  )
  return results.write_image(path, picture)


def _pixels(record: Record) -> np.ndarray:
  """Returns the picture of a record that is known to be decoded."""
  assert isinstance(record.image, np.ndarray)
  return record.image


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir()
  common_flags.checkpoint()
  flags.DEFINE_string("image", None, "Picture file, JPEG or PNG.")
  flags.DEFINE_integer(
    "example", None, "Instead of --image: index of a record of the test data."
  )
  flags.DEFINE_string(
    "dataset",
    "",
    "Of --example: entry of data.evaluation; by default the task's first one.",
  )
  common_flags.split("Of --example: split; evaluation.split by default.")
  flags.DEFINE_string("task", None, "One of the run's tasks.")
  flags.DEFINE_string("prompt", None, "Question, expression or hypothesis.")
  flags.DEFINE_string(
    "premise", None, "Entailment: a caption that is known to be true."
  )
  flags.DEFINE_string("overlay", None, "Grounding: PNG file to write.")
  common_flags.json()
  decoding_flags.define_flags()
  common_flags.answers()
  flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  check_json_path(settings.json)
  outcome = predict(
    settings.workdir,
    task=settings.task,
    image=settings.image,
    example=settings.example,
    dataset=settings.dataset,
    split=settings.split,
    prompt=settings.prompt,
    premise=settings.premise,
    overlay=settings.overlay,
    checkpoint=settings.checkpoint,
    decoding=decoding_flags.from_flags(),
    answers=settings.answers,
  )
  for text in outcome["warnings"]:
    show(f"warning: {escape(text)}", file=sys.stderr)
  if settings.json != common_flags.STDOUT:
    show(outcomes.format_outcome(outcome))
  write_json(settings.json, outcome, indent=None)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
