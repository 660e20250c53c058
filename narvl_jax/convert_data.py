"""Converts a source to ArrayRecord shards, or verifies a folder of shards.

    python -m narvl_jax.convert_data vqa_train.tsv --task=vqa --to=vqa_train
    python -m narvl_jax.convert_data vqa_train --verify

Exit codes: 0, 1 (`--verify` found faults, one line each), 2 (a mistake in the
command).
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data.example import TASKS
from narvl_jax.data.pictures.files import EXIF_ORIENTATIONS
from narvl_jax.data.shards import conversion, manifest
from narvl_jax.data.sources import parse_options
from narvl_jax.errors import UserError
from narvl_jax.files.paths import check_folder
from narvl_jax.files.stores import as_path
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show


def define_flags() -> None:
  """Defines the flags of the command."""
  common_flags.to("Folder for the shards.", "")
  common_flags.choice("task", "", TASKS, "Task of the records.")
  common_flags.split("Split of the source.")
  flags.DEFINE_string(
    "options",
    "{}",
    'Options of the source as JSON, such as {"columns": "0,4"}.',
  )
  flags.DEFINE_string("name", "", "Name of shards; default: TASK-SPLIT.")
  common_flags.max_examples(
    "Convert only the first records; 0: all.", 0, old="limit", lower_bound=0
  )
  flags.DEFINE_integer(
    "shards", 0, "Number of shards; 0: by --shard_size.", lower_bound=0
  )
  common_flags.shard_size(lower_bound=1)
  flags.DEFINE_integer(
    "image_size",
    0,
    "Store pictures as square JPEGs of this many pixels a side; 0: unchanged.",
    lower_bound=0,
    upper_bound=8192,
  )
  flags.DEFINE_integer(
    "quality", 95, "Quality of these JPEGs.", lower_bound=1, upper_bound=100
  )
  flags.DEFINE_enum(
    "exif_orientation",
    "ignore",
    EXIF_ORIENTATIONS,
    "apply: turn pictures upright by their EXIF orientation. ignore: keep them"
    " as stored; without --image_size the config of the run decides.",
  )
  flags.DEFINE_integer(
    "num_workers",
    os.cpu_count() or 1,
    "Processes; 0: only this one.",
    lower_bound=0,
  )
  common_flags.rename("workers", "num_workers")
  common_flags.max_bad_fraction(default=0.01)
  flags.DEFINE_bool("verify", False, "Read the folder and compare hashes.")


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  spec = argv[1]
  if not flags.FLAGS.to and not flags.FLAGS.verify:
    raise UserError(
      "--to is missing: set it to the folder for the shards (or pass"
      " --verify to check a folder)"
    )
  if flags.FLAGS.to:
    _convert(spec)
  if flags.FLAGS.verify:
    _verify(as_path(flags.FLAGS.to or spec))


def _convert(spec: str) -> None:
  check_folder("--to", flags.FLAGS.to)
  job, origin = conversion.plan(
    spec,
    flags.FLAGS.to,
    task=flags.FLAGS.task,
    split=flags.FLAGS.split,
    options=parse_options(flags.FLAGS.options),
    name=flags.FLAGS.name,
    limit=flags.FLAGS.max_examples,
    shards=flags.FLAGS.shards,
    shard_size=flags.FLAGS.shard_size,
    image_size=flags.FLAGS.image_size,
    quality=flags.FLAGS.quality,
    exif_orientation=flags.FLAGS.exif_orientation,
  )
  try:
    done = conversion.convert(
      job,
      origin,
      num_workers=flags.FLAGS.num_workers,
      max_bad_fraction=flags.FLAGS.max_bad_fraction,
      log=show,
    )
  except KeyboardInterrupt:
    show("stopped; the same command continues", file=sys.stderr)
    sys.exit(130)
  size = sum(shard.bytes for shard in done.shards)
  show(
    f"{done.records} records of {done.task}, split {done.split}, in"
    f" {len(done.shards)} shards of {size / 1e6:.1f} MB,"
    f" {len(done.bad_records)} bad: {flags.FLAGS.to}"
  )
  if not flags.FLAGS.split and done.split == "train":
    show("sources read them as split train; for another name set --split")


def _verify(folder: pathlib.Path) -> None:
  with progress.doing(f"reading the shards of {folder}"):
    faults = manifest.verify(
      folder, num_threads=max(flags.FLAGS.num_workers, 1)
    )
  for fault in faults:
    show(fault)
  if faults:
    sys.exit(1)
  show(f"{folder}: every shard matches the manifest")


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=1, positional_name="what to convert")
