r"""Asks a trained run about one picture.

python -m narvl_jax.predict --workdir=runs/shapes --image=photo.jpg \
    --task=vqa --prompt="what color is the circle?"

Prints the answer and its probability; for grounding the box in pixels of the
picture, and writes the picture with the box (--overlay=FILE.png). Captions
need no prompt. `--example=INDEX` instead of `--image` takes picture and prompt
from the run's own test data, saves the picture, and prints the truth, too.
`--json` prints one JSON object; `--decoding=beam --num_best=3` more answers.
`--min_probability=0.8` gives no answer that is less likely to be right.
"""

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
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import rendering
from narvl_jax.errors import UserError
from narvl_jax.evaluation import outcomes, results
from narvl_jax.files.paths import check_file
from narvl_jax.prediction import decoding_flags, foreign_input
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.prediction.calibration import read_temperatures
from narvl_jax.prediction.decodings import (
  check_answers_heeded,
  decoding_name,
  decodings_for,
)
from narvl_jax.prediction.predictor import Answer, Predictor
from narvl_jax.prediction.request import Request
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
  min_probability: float | None = None,
) -> outcomes.Outcome:
  """Predicts the answer to one request.

  Args:
    workdir: run folder.
    task: see `prediction.request.Request`.
    image: likewise; exactly one of `image` and `example` is given.
    example: likewise.
    dataset: likewise.
    split: likewise.
    prompt: likewise.
    premise: likewise.
    overlay: grounding only: PNG to write; by default in the run folder.
    checkpoint: "best", "last" or a step.
    decoding: see `decodings.decodings_for`.
    answers: file of the answers that constrained VQA allows; the config's if
      "".
    min_probability: in [0, 1]; an answer that is less likely to be right is
      withheld.

  Returns:
    step, task, image (path), prompt, answer (text; grounding: box in pixels of
    the picture, None without a box), probability (calibrated if the run has a
    fitting calibration.json; then also raw_probability); for parallel models
    query_entropy (nats) and for boxes probability_iou50; with `num_best` above
    1 also alternatives (answer and raw probability, best first); with `example`
    also truth; for grounding also overlay (path); with `min_probability` also
    it, confidence, and abstained, in which case answer is None; warnings (one
    sentence each).

  Raises:
    UserError: run, picture, task or text is wrong or missing.
  """
  if min_probability is not None and not 0 <= min_probability <= 1:
    raise UserError(
      f"--min_probability={min_probability:g} is not in [0, 1]; nearest:"
      f" --min_probability={min(max(min_probability, 0), 1)}"
    )
  request = Request(task, image, example, dataset, split, prompt, premise)
  request.check()
  # Mistakes are reported before the weights are read.
  if overlay is not None:
    check_file("--overlay", overlay)
  workdir = pathlib.Path(workdir)
  folder = workdir / results.PREDICTIONS_FOLDER
  config = workdir_lib.read_config(workdir)
  results.make_way(workdir)
  record = request.read(config)
  name = record.task
  experiment, variables, step = load_run(workdir, checkpoint)
  if answers:
    experiment = with_answers(experiment, answers)
  decodings = decodings_for(experiment, decoding)
  check_answers_heeded({name: decodings[name]}, answers)
  temperatures, note = read_temperatures(
    workdir, step, decoding_name(decoding, answers)
  )
  with progress.doing("compiling the model and answering"):
    answer = Predictor(experiment, variables, decodings, temperatures).answer(
      record
    )

  if image is None:
    path = folder / f"example_{name}_{example}.png"
    results.write_image(path, Image.fromarray(_pixels(record)))
  else:
    path = pathlib.Path(image)
  outcome: outcomes.Outcome = {
    "step": step,
    "task": name,
    "image": str(path),
    "prompt": record.prompt,
    **outcomes.plain_answer(answer),
  }
  if min_probability is not None:
    outcomes.withhold(outcome, answer, min_probability)
  if name == "grounding" and not outcome.get("abstained"):
    target = overlay or folder / f"overlay_{path.stem}.png"
    outcome["overlay"] = str(_write_overlay(pathlib.Path(target), answer))
  outcome["warnings"] = foreign_input.warnings_about(
    experiment, record, resized=image is not None
  )
  outcome["warnings"] += [note] if note else []
  return outcome


def _write_overlay(path: pathlib.Path, answer: Answer) -> pathlib.Path:
  assert not isinstance(answer.value, str)
  record, box = answer.record, answer.value
  shown = outcomes.format_box(box) if any(box) else "no box"
  picture = rendering.box_overlay(
    _pixels(record),
    box if any(box) else None,
    target_box=record.box,
    caption=f"{record.prompt}: {shown} ({100 * answer.confidence:.0f} %)",
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
  common_flags.request()
  flags.DEFINE_string("overlay", None, "Grounding: PNG file to write.")
  flags.DEFINE_float(
    "min_probability", None, "Withhold an answer that is less likely right."
  )
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
    min_probability=settings.min_probability,
  )
  for text in outcome["warnings"]:
    show(f"warning: {escape(text)}", file=sys.stderr)
  if settings.json != common_flags.STDOUT:
    show(outcomes.format_outcome(outcome))
  write_report(settings.json, outcome, indent=None)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
