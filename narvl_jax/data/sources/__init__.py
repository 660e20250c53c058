"""Sources of records: `load_source` opens by name, `open_source` by path."""

import importlib
import inspect
import json
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.example import Record
from narvl_jax.data.sources.files import check_uncompressed
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.stores import as_path

# name: module and class, imported on demand.
SOURCES = {
  "shapes": ("narvl_jax.data.sources.shapes", "ShapesSource"),
  "easy_vqa": ("narvl_jax.data.sources.easy_vqa", "EasyVQASource"),
  "ofa_tsv": ("narvl_jax.data.sources.ofa_tsv", "OfaTsvSource"),
  "jsonl": ("narvl_jax.data.sources.jsonl", "JsonlSource"),
  "tfds": ("narvl_jax.data.sources.tfds.source", "TfdsSource"),
  "array_record": ("narvl_jax.data.sources.array_record", "ArrayRecordSource"),
}
_SOURCE_OF_SUFFIX = {".tsv": "ofa_tsv", ".jsonl": "jsonl"}
MANIFEST = "manifest.json"


def load_source(
  name: str,
  /,
  *,
  task: str,
  split: str,
  seed: int = 0,
  exif_orientation: str = "ignore",
  **options: Any,
) -> Sequence[Record]:
  """Opens a source of records for one task.

  Args:
    name: one of `SOURCES`.
    seed: used by procedural sources only.
    exif_orientation: "ignore" or "apply"; see `RecordSource`.
    **options: keyword arguments of the source's class.

  Raises:
    UserError: unknown source, task, split or option.
  """
  if name not in SOURCES:
    raise UserError(
      f'Unknown source "{name}".{did_you_mean(name, SOURCES)} '
      "Set data.train.NAME.source."
    )
  module, attribute = SOURCES[name]
  source = getattr(importlib.import_module(module), attribute)
  parameters = set(inspect.signature(source).parameters)
  known = parameters - {"task", "split", "seed"}
  for option in options:
    if option not in known:
      raise UserError(
        f'{name}: unknown option "{option}".{did_you_mean(option, known)} '
        "Set data.train.NAME.options."
      )
  if "seed" in parameters:
    options["seed"] = seed
  opened = source(task=task, split=split, **options)
  opened.exif_orientation = exif_orientation
  return opened


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
  """Returns name and options of the source that a command line names.

  Args:
    spec: a file `*.tsv` (OFA) or `*.jsonl`, a folder of ArrayRecord shards,
      `tfds:NAME`, or the name of a source. A path may contain `{split}` and
      glob patterns.

  Raises:
    UserError: `spec` is none of these.
  """
  if spec.startswith("tfds:"):
    return "tfds", {"name": spec.removeprefix("tfds:")}
  path = as_path(spec)
  check_uncompressed(spec)
  if path.suffix in _SOURCE_OF_SUFFIX:
    return _SOURCE_OF_SUFFIX[path.suffix], {"path": spec}
  if (path / MANIFEST).exists():
    return "array_record", {"path": spec}
  if spec in SOURCES:
    return spec, {}
  if path.is_dir():
    raise UserError(
      f'"{spec}" is a folder without {MANIFEST}; pass a folder that'
      " narvl_jax.convert_data wrote, a file *.tsv or *.jsonl, tfds:NAME, or"
      f" one of {', '.join(sorted(SOURCES))}"
    )
  raise UserError(
    f'"{spec}" is not a source: neither a file *.tsv or *.jsonl, nor a folder'
    " with"
    f" {MANIFEST}, nor tfds:NAME.{did_you_mean(spec, SOURCES)}"
  )


def open_source(
  spec: str, *, task: str = "", split: str = "", **options: Any
) -> Sequence[Record]:
  """Opens what a command line names; see `parse_spec` and `load_source`.

  Raises:
    UserError: the source cannot be opened, or it needs a task or split.
  """
  name, found = parse_spec(spec)
  # A folder of shards has one split and knows it.
  default = "" if name == "array_record" else "train"
  return load_source(
    name, task=task, split=split or default, **{**found, **options}
  )


def unused_split(spec: str, split: str) -> str:
  """Returns a note if `--split` has no effect on a source; otherwise ""."""
  name, _ = parse_spec(spec)
  if not split or name not in _SOURCE_OF_SUFFIX.values() or "{split}" in spec:
    return ""
  return (
    f'--split={split} changes nothing: "{spec}" is one file for all splits;'
    " write {split} where its name has the split"
  )


def parse_options(text: str) -> dict[str, Any]:
  """Parses the flag `--options`, a JSON object.

  Raises:
    UserError: it is none.
  """
  try:
    options = json.loads(text)
  except ValueError as e:
    raise UserError(
      f"--options={text!r} is not JSON ({e}); pass an object such as"
      ' --options=\'{"columns": "0,4,2"}\''
    ) from e
  if not isinstance(options, dict):
    raise UserError(
      f"--options={text!r} must be a JSON object in braces, such as"
      ' --options=\'{"columns": "0,4,2"}\''
    )
  return options


def locate(source: Sequence[Record], index: int) -> str:
  """Returns where a record comes from, such as `vqa_train.tsv row 17`."""
  own = getattr(source, "locate", None)
  return own(index) if own is not None else f"record {index}"
