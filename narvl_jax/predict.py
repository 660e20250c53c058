r"""Predicts the answer of a trained run for one picture.

python -m narvl_jax.predict --workdir=runs/shapes --image=photo.jpg \
    --task=vqa --prompt="what color is the circle?"

Prints the answer and its probability; for grounding the box in pixels of the
picture, and writes the picture with the box (--overlay=FILE.png). Captions
need no prompt. `--example=INDEX` instead of `--image` reads picture and prompt
from the run's own test data, saves the picture, and also prints the truth.
`--json` prints one JSON object; `--decoding=beam --num_best=3` more answers.
`--min_probability=0.8` withholds an answer that is less likely to be right.
"""

import dataclasses
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_json_path, write_report
from narvl_jax.errors import check_fractions
from narvl_jax.files.paths import check_file
from narvl_jax.files.stores import as_path
from narvl_jax.prediction import decoding_flags
from narvl_jax.prediction.calibration import read_temperatures
from narvl_jax.prediction.request import Request
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a prediction.

  Attributes:
    overlay: grounding only: PNG to write; by default in the run folder.
    checkpoint: "best", "last" or a step.
    decoding: see `decodings.decodings_for`.
    answers: file of the answers that constrained VQA allows; the config's if
      "".
    min_probability: threshold in [0, 1]; an answer that is less likely to be
      right is withheld.
  """

  overlay: str | os.PathLike[str] | None = None
  checkpoint: str | int = "best"
  decoding: Mapping[str, Any] | None = None
  answers: str = ""
  min_probability: float | None = None

  def __post_init__(self) -> None:
    check_fractions(min_probability=self.min_probability)


def predict(
  workdir: str | os.PathLike[str],
  request: Request,
  options: Options = Options(),
) -> dict[str, Any]:
  """Predicts the answer to one request.

  Returns:
    step, task, image (path), prompt, answer (text; grounding: box in pixels of
    the picture, None without a box), probability (calibrated if the run has a
    matching calibration.json; then also raw_probability); for parallel models
    query_entropy (nats) and for boxes probability_iou50; with `num_best` above
    1 also alternatives (answer and raw probability, best first); with `example`
    also truth; for grounding also overlay (path); with `min_probability` also
    it, confidence, and abstained, in which case answer is None; warnings (one
    sentence each).

  Raises:
    UserError: run, picture, task or text is wrong or missing.
  """
  # Imported here, so that --help is fast.
  from narvl_jax.checkpointing.runs import load_run
  from narvl_jax.evaluation import outcomes, results
  from narvl_jax.prediction import decodings as decodings_lib
  from narvl_jax.prediction.answer_list import with_answers
  from narvl_jax.prediction.foreign_input import warnings_about
  from narvl_jax.prediction.predictor import Predictor
  from narvl_jax.run_folder import workdir as workdir_lib

  request.check()
  # Mistakes are reported before the weights are read.
  if options.overlay is not None:
    check_file("--overlay", options.overlay)
  workdir = as_path(workdir)
  folder = workdir / results.PREDICTIONS_FOLDER
  config = workdir_lib.read_config(workdir)
  results.make_way(workdir)
  record = request.read(config)
  name = record.task
  experiment, variables, step = load_run(workdir, options.checkpoint)
  if options.answers:
    experiment = with_answers(experiment, options.answers)
  decodings = decodings_lib.decodings_for(experiment, options.decoding)
  decodings_lib.check_answers_used({name: decodings[name]}, options.answers)
  decoding_name = decodings_lib.decoding_name(options.decoding, options.answers)
  temperatures, note = read_temperatures(workdir, step, decoding_name)
  with progress.doing("compiling the model and answering"):
    answer = Predictor(experiment, variables, decodings, temperatures).answer(
      record
    )
  if request.image is None:
    path = folder / f"example_{name}_{request.example}.png"
    results.write_image(path, outcomes.picture(record))
  else:
    path = pathlib.Path(request.image)
  outcome = {
    "step": step,
    "task": name,
    "image": str(path),
    "prompt": record.prompt,
    **outcomes.plain_answer(answer),
  }
  if options.min_probability is not None:
    outcomes.withhold(outcome, answer, options.min_probability)
  if name == "grounding" and not outcome.get("abstained"):
    target = options.overlay or folder / f"overlay_{path.stem}.png"
    results.write_image(target, outcomes.overlay(answer))
    outcome["overlay"] = str(target)
  outcome["warnings"] = warnings_about(
    experiment, record, resized=request.image is not None
  )
  outcome["warnings"] += [note] if note else []
  return outcome


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir()
  common_flags.checkpoint()
  common_flags.request()
  flags.DEFINE_string("overlay", None, "Grounding: PNG file to write.")
  flags.DEFINE_float(
    "min_probability",
    None,
    "Withhold an answer that is less likely to be right.",
  )
  common_flags.json()
  decoding_flags.define_flags()
  common_flags.answers()
  common_flags.compilation_cache()
  flags.mark_flag_as_required("workdir")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  # Imported here, so that --help is fast.
  from narvl_jax.evaluation.outcomes import format_outcome

  settings = flags.FLAGS
  check_json_path(settings.json)
  options = Options(
    overlay=settings.overlay,
    checkpoint=settings.checkpoint,
    decoding=decoding_flags.from_flags(),
    answers=settings.answers,
    min_probability=settings.min_probability,
  )
  outcome = predict(settings.workdir, Request.from_flags(), options)
  for text in outcome["warnings"]:
    show(f"warning: {escape(text)}", file=sys.stderr)
  if settings.json != common_flags.STDOUT:
    show(format_outcome(outcome))
  write_report(settings.json, outcome, indent=None)


if __name__ == "__main__":
  define_flags()
  cli.run(main)
