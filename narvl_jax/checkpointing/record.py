"""The record of a checkpoint: what it is, and what its arrays are.

A checkpoint is a folder `STEP` with an item (a folder) `params` for parameters
and running statistics, `optimizer` for its state and the step, `ema` for moving
averages if there are any, and `record`. The record is JSON, so that what a
checkpoint holds is known without a model, a device, or a byte of an array.
"""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from narvl_jax.files.regular import read_regular

ITEM = "record"
FILE = "record.json"
ITEMS = ("params", "optimizer", "ema")
# Nothing else is the name of a step: neither "007" nor "²".
_STEP = re.compile(r"0|[1-9][0-9]*")


class ArrayRecord(NamedTuple):
  """One array of a checkpoint.

  Attributes:
    shape: its sides.
    dtype: such as "float32".
    checksum: see `narvl_jax.checkpointing.checksums`.
  """

  shape: tuple[int, ...]
  dtype: str
  checksum: str = ""


class CheckpointRecord(NamedTuple):
  """What a checkpoint is.

  Attributes:
    step: number of updates.
    score: of its evaluation, higher is better; None if there was none.
    run: where the run stood beside its arrays, such as its place in the data.
    config: of the run, seeds included; None for weights without a run.
    leaves: name -> array. Names are those of a `TrainState`, such as
      `params/encoder/kernel` or `opt_state/0/count`.
    vocabulary: fingerprint of the run's; None where it is not known, as in
      checkpoints of earlier versions.
  """

  step: int
  score: float | None
  run: dict[str, Any]
  config: Any
  leaves: dict[str, ArrayRecord]
  vocabulary: str | None = None


class BrokenRecord(ValueError):
  """The record cannot be read, or is not what was written."""


class RenamedCheckpoint(BrokenRecord):
  """The folder has the name of another step than its record."""

  def __init__(self, step: int | str) -> None:
    super().__init__(f"is the checkpoint {step} under another name")


def stored_steps(folder: pathlib.Path) -> list[int]:
  """Returns the names of the checkpoints in a folder, in order."""
  names = (path.name for path in folder.glob("*"))
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def name_leaves(items: Mapping[str, Any]) -> dict[str, Any]:
  """Returns name -> leaf of the items of a checkpoint."""
  found = {}
  for item in ITEMS:
    for path, leaf in jax.tree.leaves_with_path(items.get(item)):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      found[f"ema/{name}" if item == "ema" else name] = leaf
  return found


def item_of(name: str) -> str:
  """Returns the item that an array is in."""
  first = name.split("/", 1)[0]
  if first in ("params", "batch_stats"):
    return "params"
  return "ema" if first == "ema" else "optimizer"


def to_json(record: CheckpointRecord) -> dict[str, str]:
  """Returns what is written: a text, and a digest by which it is checked."""
  text = json.dumps(record._asdict())
  return {"digest": _digest(text), "text": text}


def read_record(folder: pathlib.Path) -> CheckpointRecord:
  """Reads the record of a checkpoint.

  Args:
    folder: of the checkpoint; its name must be the step.

  Raises:
    FileNotFoundError or NotADirectoryError: there is no record.
    RenamedCheckpoint: the record is that of another step.
    BrokenRecord: the record cannot be read or is damaged.
  """
  try:
    data = read_regular(folder / ITEM / FILE)
  except (FileNotFoundError, NotADirectoryError):
    raise
  except OSError as error:
    raise BrokenRecord(f"cannot be read: {error.strerror}") from error
  try:
    written = json.loads(data)
    text = written["text"]
    # Any other spelling of the same would be a change as well.
    if (
      json.dumps(written).encode() != data or _digest(text) != written["digest"]
    ):
      raise ValueError("it is not what was written")
    record = _from_json(json.loads(text))
  # Damaged JSON may hold values of any type, nested to any depth.
  except (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
  ) as error:
    raise BrokenRecord("was changed") from error
  if str(record.step) != folder.name:
    raise RenamedCheckpoint(record.step)
  return record


def _from_json(values: Any) -> CheckpointRecord:
  """Returns the record of which the values were written.

  Raises:
    KeyError, TypeError, AttributeError, ValueError: they are not of a record.
  """
  leaves = {
    name: ArrayRecord(tuple(shape), dtype, checksum)
    for name, (shape, dtype, checksum) in values["leaves"].items()
  }
  record = CheckpointRecord(**{**values, "leaves": leaves})
  right = (
    type(record.step) is int
    and isinstance(record.score, (int, float, type(None)))
    and isinstance(record.run, dict)
    and isinstance(record.config, (dict, type(None)))
    and isinstance(record.vocabulary, (str, type(None)))
    and all(
      all(type(side) is int for side in leaf.shape)
      and isinstance(leaf.dtype, str)
      and isinstance(leaf.checksum, str)
      for leaf in leaves.values()
    )
  )
  if not right:
    raise TypeError("a value is of another type than those of a record")
  return record


def read_leaf(folder: pathlib.Path, name: str) -> np.ndarray:
  """Reads one whole array of a checkpoint to the host.

  Args:
    folder: of the checkpoint.
    name: one of its record.

  Raises:
    ValueError: it cannot be read.
  """
  import tensorstore as ts

  item = item_of(name)
  stored = name.removeprefix("ema/").replace("/", ".")
  spec = {
    "driver": "zarr",
    "kvstore": {
      "driver": "ocdbt",
      "base": {"driver": "file", "path": f"{folder / item}/"},
      "path": f"{stored}/",
    },
  }
  # A context of its own caches nothing that may have changed since.
  store = ts.open(spec, open=True, read=True, context=ts.Context()).result()
  return np.asarray(store.read().result())


def describe_shape(shape: Iterable[int]) -> str:
  """Returns a shape such as `3x4`."""
  return "x".join(map(str, shape)) or "a number"


def _digest(text: str) -> str:
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
