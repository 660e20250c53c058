"""Checks a data set before training, and reports what to change.

  python -m narvl_jax.check_data vqa.tsv --task=vqa [--vocabulary=FOLDER]
  python -m narvl_jax.check_data --config=configs/own_data.py [NAME]

SPEC is a file `*.tsv` or `*.jsonl`, a folder of ArrayRecord shards, `tfds:NAME`
or the name of a source. With `--config` it is the name of an entry of
`data.train` or `data.evaluation` (`train.NAME` or `evaluation.NAME` where both
have it); without a name all entries are checked.

Prints counts, bad records with file and row, and lengths compared with the
limits; the last line is a verdict with the flags to change. Draws five examples
as the model receives them. Exit code 0: usable, possibly with these flags; 2:
not usable, or a mistake in the command.
"""

import sys
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import (
  check_json_path,
  check_output_file,
  write_report,
)
from narvl_jax.data.example import TASKS
from narvl_jax.data.pictures.files import EXIF_ORIENTATIONS
from narvl_jax.errors import USER_ERROR_CODE, UserError
from narvl_jax.terminal.text import show


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  common_flags.choice("task", "", TASKS, "Task of the records.")
  common_flags.split("Split to read.")
  flags.DEFINE_string("vocabulary", "", "Folder with vocabulary files.")
  flags.DEFINE_integer(
    "num_queries",
    None,
    "N of the model; default: that of the config.",
    lower_bound=1,
  )
  common_flags.max_examples(
    "Number of records whose pictures are read; 0: all.", 2000, lower_bound=0
  )
  flags.DEFINE_enum(
    "exif_orientation",
    None,
    EXIF_ORIENTATIONS,
    "Without --config: ignore or apply the EXIF orientation of pictures.",
  )
  flags.DEFINE_boolean("all", False, "Read the texts of all records.")
  flags.DEFINE_integer("num_threads", 2, "Reading threads.", lower_bound=1)
  common_flags.rename("threads", "num_threads")
  flags.DEFINE_string(
    "png", "data_check.png", "Picture of examples to draw; empty: none."
  )
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  # Imported here, so that --help is fast.
  from narvl_jax.data.checking.report import NOT_USABLE
  from narvl_jax.experiment import data_check

  values = flags.FLAGS
  check_json_path(values.json)
  if values.png:
    check_output_file("png", values.png)
  spec = argv[1] if len(argv) > 1 else ""
  if values.config is not None:
    if values.exif_orientation:
      raise UserError(
        f"--exif_orientation={values.exif_orientation} is for a source without"
        " a config; set --config.data.exif_orientation="
        f"{values.exif_orientation}"
      )
    entries = data_check.open_entries(values.config, spec, values.split)
  elif spec:
    orientation = values.exif_orientation or "ignore"
    entries = [
      data_check.open_spec(spec, values.task, values.split, orientation)
    ]
  else:
    raise UserError("nothing to check: name a source, or set --config=FILE")
  vocabulary, origin = data_check.find_vocabulary(
    values.vocabulary, values.config, entries
  )
  show(f"vocabulary     {vocabulary.size:,} ids, {origin}")
  options = data_check.Options(
    num_queries=values.num_queries,
    max_examples=values.max_examples,
    all_texts=values.all,
    num_threads=values.num_threads,
    png=values.png,
  )
  report, verdict = data_check.check_entries(entries, vocabulary, options)
  write_report(values.json, report, indent=1)
  sys.stdout.flush()
  sys.exit(USER_ERROR_CODE if verdict.word == NOT_USABLE else 0)


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(0, 1), positional_name="the source")
