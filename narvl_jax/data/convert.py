"""Converts any source to ArrayRecord shards, or verifies such a folder.

    python -m narvl_jax.data.convert vqa_train.tsv --task=vqa --to=vqa_train
    python -m narvl_jax.data.convert vqa_train --verify

Exit codes: 0, 1 (`--verify` found faults, a line each), 2 (a mistake).
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from narvl_jax import cli
from narvl_jax.data import conversion, manifest
from narvl_jax.data.sources import parse_options
from narvl_jax.errors import UserError
from narvl_jax.terminal import show

_TO = flags.DEFINE_string("to", "", "Folder that gets the shards.")
_TASK = flags.DEFINE_string(
  "task", "", "caption, vqa, grounding or entailment."
)
_SPLIT = flags.DEFINE_string("split", "", "Split of the source.")
_OPTIONS = flags.DEFINE_string(
  "options", "{}", 'Options of the source as JSON, such as {"columns": "0,4"}.'
)
_NAME = flags.DEFINE_string("name", "", "Name of shards; default: TASK-SPLIT.")
_LIMIT = flags.DEFINE_integer(
  "limit", 0, "Convert only the first records; 0: all.", lower_bound=0
)
_SHARDS = flags.DEFINE_integer(
  "shards", 0, "Number of shards; 0: by --shard_size.", lower_bound=0
)
_SHARD_SIZE = flags.DEFINE_integer(
  "shard_size", 2000, "Records a shard, about.", lower_bound=1
)
_IMAGE_SIZE = flags.DEFINE_integer(
  "image_size",
  0,
  "Store pictures as JPEG of this many pixels square; 0: as they are.",
  lower_bound=0,
  upper_bound=8192,
)
_QUALITY = flags.DEFINE_integer(
  "quality", 95, "Of these JPEG pictures.", lower_bound=1, upper_bound=100
)
_WORKERS = flags.DEFINE_integer(
  "workers",
  os.cpu_count() or 1,
  "Processes; 0: none but this one.",
  lower_bound=0,
)
_MAX_BAD = flags.DEFINE_float(
  "max_bad_fraction",
  0.01,
  "Share of records that may be bad and left out.",
  lower_bound=0,
  upper_bound=1,
)
_VERIFY = flags.DEFINE_bool(
  "verify", False, "Read the folder again and compare hashes."
)


def main(argv: Sequence[str]) -> None:
  """Converts, verifies or both, as the flags say."""
  spec = argv[1]
  if not _TO.value and not _VERIFY.value:
    raise UserError(
      "--to is missing: set it to the folder that gets the shards (or pass"
      " --verify to check a folder)"
    )
  if _TO.value:
    _convert(spec)
  if _VERIFY.value:
    _verify(pathlib.Path(_TO.value or spec))


def _convert(spec: str) -> None:
  job, origin = conversion.plan(
    spec,
    _TO.value,
    task=_TASK.value,
    split=_SPLIT.value,
    options=parse_options(_OPTIONS.value),
    name=_NAME.value,
    limit=_LIMIT.value,
    shards=_SHARDS.value,
    shard_size=_SHARD_SIZE.value,
    image_size=_IMAGE_SIZE.value,
    quality=_QUALITY.value,
  )
  try:
    done = conversion.convert(
      job,
      origin,
      num_workers=_WORKERS.value,
      max_bad_fraction=_MAX_BAD.value,
      tell=show,
    )
  except KeyboardInterrupt:
    show("stopped; the same command continues", file=sys.stderr)
    sys.exit(130)
  size = sum(shard.bytes for shard in done.shards)
  show(
    f"{done.records} records of {done.task}, split {done.split}, in"
    f" {len(done.shards)} shards of {size / 1e6:.1f} MB,"
    f" {len(done.bad_records)} bad: {_TO.value}"
  )
  if not _SPLIT.value and done.split == "train":
    show("sources find them as split train; for another name set --split")


def _verify(folder: pathlib.Path) -> None:
  faults = manifest.verify(folder, num_threads=max(_WORKERS.value, 1))
  for fault in faults:
    show(fault)
  if faults:
    sys.exit(1)
  show(f"{folder}: every shard is as the manifest says")


if __name__ == "__main__":
  cli.run(main, positional=1, positional_name="what to convert")
