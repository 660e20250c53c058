r"""Shows what each query of a parallel model did for one request.

python -m narvl_jax.inspect --workdir=runs/shapes --task=vqa --example=0 \
    --to=inspection
python -m narvl_jax.inspect --workdir=runs/shapes --image=photo.jpg \
    --task=vqa --prompt="what color is the circle?" --target=red --to=inspection

Writes inspection.png and inspection.html into the folder: the likeliest tokens
of every query, which queries emit which token of the answer, where they look,
and the alignment of a target (`--target`; otherwise the truth, if it is known).
Grounding reads the target as x0,y0,x1,y1 in pixels. The page needs no other
file and no network.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.files.disk import write_text
from narvl_jax.files.paths import check_folder
from narvl_jax.files.stores import as_path
from narvl_jax.prediction.request import Request
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import escape, show

_NAME = "inspection"


def inspect(
  workdir: str | os.PathLike[str],
  request: Request,
  to: str | os.PathLike[str],
  *,
  target: str = "",
  checkpoint: str | int = "best",
) -> list[pathlib.Path]:
  """Writes a picture and a page about one request.

  Args:
    workdir: run folder.
    request: the picture and the texts.
    to: folder of the results.
    target: see `inspection.trace.trace_request`.
    checkpoint: "best", "last" or a step.

  Returns:
    The files.

  Raises:
    UserError: run, request or target is wrong, or the run is autoregressive.
  """
  # Imported here, so that --help is fast.
  from narvl_jax.checkpointing.runs import load_run
  from narvl_jax.evaluation import results
  from narvl_jax.inspection.page import trace_page
  from narvl_jax.inspection.picture import answer_text, draw
  from narvl_jax.inspection.trace import trace_request
  from narvl_jax.run_folder import workdir as workdir_lib

  request.check()
  check_folder("--to", to)
  folder, workdir = as_path(to), as_path(workdir)
  record = request.read(workdir_lib.read_config(workdir))
  experiment, variables, step = load_run(workdir, checkpoint)
  with progress.doing("compiling the model and answering"):
    trace = trace_request(experiment, variables, record, target)
  title = f"{workdir.resolve().name}, step {step}: {record.task}"
  source = (
    f"--image={request.image}"
    if request.image is not None
    else f"--example={request.example}"
  )
  command = (
    f"python -m narvl_jax.inspect --workdir={workdir} --task={record.task}"
    f" {source}"
  )
  paths = [folder / f"{_NAME}.png", folder / f"{_NAME}.html"]
  results.write_image(paths[0], draw(trace, title))
  write_text(paths[1], trace_page(trace, title, command))
  show(f"answer {escape(answer_text(trace))} ({100 * trace.probability:.1f} %)")
  for path in paths:
    show(f"wrote {path}")
  return paths


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.workdir()
  common_flags.checkpoint()
  common_flags.to("Folder for inspection.png and inspection.html.")
  common_flags.request()
  flags.DEFINE_string(
    "target", "", "Answer whose alignment is shown; the truth by default."
  )
  common_flags.compilation_cache()
  flags.mark_flags_as_required(["workdir", "to"])


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  inspect(
    settings.workdir,
    Request.from_flags(),
    settings.to,
    target=settings.target,
    checkpoint=settings.checkpoint,
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main)
