r"""Writes predictions in the format of a data set's own evaluation.

  python -m narvl_jax.submission runs/a/predictions/test-2000-greedy.jsonl \
    --format=vqa --to=results.json [--dataset=NAME]

| format    | content                                                      |
| --------- | ------------------------------------------------------------ |
| `coco`    | [{"image_id": int, "caption": str}]                          |
| `vqa`     | [{"question_id": int, "answer": str}]                        |
| `refcoco` | [{"sent_id": int, "box": [x, y, width, height]}] in pixels   |
| `aokvqa`  | {question id: {"multiple_choice": "", "direct_answer": str}} |

Ids are those of the records. Every example must be present exactly once; the
report of the evaluation, in the folder `evaluations`, has the number of
examples.
"""

import os
import sys
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import check_output_file
from narvl_jax.errors import UserError
from narvl_jax.evaluation.saved import submission as formats
from narvl_jax.evaluation.saved.files import open_saved
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import as_path
from narvl_jax.terminal.text import show


def submission(
  predictions: str | os.PathLike[str],
  *,
  form: str,
  to: str | os.PathLike[str],
  dataset: str = "",
) -> None:
  """Writes a submission file.

  Args:
    predictions: file `predictions/NAME.jsonl` of an evaluation.
    form: one of `formats.FORMATS`.
    to: file to write.
    dataset: entry of `data.evaluation`; the only one of the task by default.

  Raises:
    UserError: examples are missing, ids do not fit the format, or a file
      cannot be read or written.
  """
  saved = open_saved(predictions)
  chosen = formats.choose(saved.predictions(), form, dataset)
  if saved.report is None:
    show(
      "note: there is no report in ../evaluations of the predictions; whether"
      " examples are missing is not checked",
      file=sys.stderr,
    )
  else:
    formats.check_complete(saved, chosen)
  write_json(as_path(to), formats.submission(chosen, form), indent=None)
  show(
    f'{len(chosen):,} predictions of "{chosen[0]["dataset"]}" in {to}, format'
    f' {form}; the first id is "{chosen[0]["id"]}"'
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_enum("format", None, [*formats.FORMATS], "Format of the file.")
  common_flags.to("File to write, *.json.")
  flags.DEFINE_string(
    "dataset", "", "Entry of data.evaluation, if the task has several."
  )


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  options = flags.FLAGS
  if options.format is None:
    known = ", ".join(formats.FORMATS)
    raise UserError(f"--format is missing; one of {known}")
  if options.to is None:
    raise UserError("--to=FILE.json is missing: where to write")
  check_output_file("to", options.to)
  submission(
    argv[1], form=options.format, to=options.to, dataset=options.dataset
  )


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1, positional_name="the file of predictions")
