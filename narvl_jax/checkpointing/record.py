"""The record of a checkpoint: its metadata and that of its arrays.

A checkpoint is a folder `STEP` of items (folders): `params` (parameters and
running statistics), `optimizer` (its state and the step), `ema` (moving
averages, if any) and `record`. The record is JSON, so reading it needs neither
a model nor a device.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from narvl_jax.files.regular import read_regular
from narvl_jax.files.schemes import COMMIT_FILE, StoreError
from narvl_jax.files.stores import is_remote

ITEM = "record"
FILE = "record.json"
ITEMS = ("params", "optimizer", "ema")
# Neither "007" nor "²" is the name of a step.
_STEP = re.compile(r"0|[1-9][0-9]*")
# How often a folder without checkpoints is listed.
_LISTINGS = 5


class ArrayRecord(NamedTuple):
  """One array of a checkpoint.

  Attributes:
    dtype: such as "float32".
    checksum: see `checksums`.
  """

  shape: tuple[int, ...]
  dtype: str
  checksum: str = ""


class CheckpointRecord(NamedTuple):
  """Metadata of a checkpoint.

  Attributes:
    step: number of updates.
    score: score of its evaluation, higher is better; None if not evaluated.
    run: progress of the run besides the arrays, such as the data position.
    config: config of the run, with its seeds; None for weights without a run.
    leaves: name -> array. Names are those of a `TrainState`, such as
      `params/encoder/kernel` or `opt_state/0/count`.
    vocabulary: fingerprint of the vocabulary; None if unknown (checkpoints of
      earlier versions).
  """

  step: int
  score: float | None
  run: dict[str, Any]
  config: Any
  leaves: dict[str, ArrayRecord]
  vocabulary: str | None = None


class BrokenRecord(ValueError):
  """A record cannot be read, or was changed."""


class RenamedCheckpoint(BrokenRecord):
  """A folder is named after another step than that of its record."""

  def __init__(self, step: int | str) -> None:
    super().__init__(f"is the checkpoint {step} under another name")


def stored_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in a folder, in order.

  A listing is not a snapshot: while a run replaces its only checkpoint, it may
  miss both the old one and the new one. An empty listing is thus repeated.
  """
  for _ in range(_LISTINGS):
    names = [path.name for path in folder.glob("*")]
    if steps := sorted(int(name) for name in names if _STEP.fullmatch(name)):
      return [step for step in steps if is_stored(folder / str(step))]
  return []


def is_stored(place: pathlib.Path) -> bool:
  """Returns whether there is a checkpoint in a folder named after a step.

  On a disk, the folder has another name until everything is written. A store
  cannot rename, so there Orbax writes one object last.
  """
  if is_remote(place):
    return (place / COMMIT_FILE).exists()
  # A file in its place is damage, which readers report.
  return place.exists()


def unfinished(folder: pathlib.Path, step: int) -> list[pathlib.Path]:
  """Returns the folders in which a checkpoint was begun but not finished."""
  if is_remote(folder):
    place = folder / str(step)
    with contextlib.suppress(StoreError):
      return [place] if place.is_dir() and not is_stored(place) else []
    return []
  return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


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
  """Returns the content of the file: the record as text, and its digest."""
  text = json.dumps(record._asdict())
  return {"digest": digest(text.encode()), "text": text}


def read_record(folder: pathlib.Path) -> CheckpointRecord:
  """Reads the record of the checkpoint in a folder, whose name is the step.

  Raises:
    FileNotFoundError, NotADirectoryError: there is no record.
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
    # The bytes are compared: another spelling of the values is a change.
    same = json.dumps(written).encode() == data
    if not same or digest(text.encode()) != written["digest"]:
      raise ValueError("it is not what was written")
    record = _from_json(json.loads(text))
  # Damaged JSON may contain values of any type, nested to any depth.
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
  """Returns the record; any exception means that the values are damaged."""
  leaves = {
    name: ArrayRecord(tuple(shape), dtype, checksum)
    for name, (shape, dtype, checksum) in values["leaves"].items()
  }
  record = CheckpointRecord(**{**values, "leaves": leaves})
  valid = (
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
  if not valid:
    raise TypeError("a value has the wrong type")
  return record


def read_leaf(folder: pathlib.Path, name: str) -> np.ndarray:
  """Reads one array, named as in the record, to the host.

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
      "base": kvstore(folder / item),
      "path": f"{stored}/",
    },
  }
  # A new context: the files may have changed since they were cached.
  store = ts.open(spec, open=True, read=True, context=ts.Context()).result()
  return np.asarray(store.read().result())


def kvstore(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the specification of a folder for TensorStore."""
  if not is_remote(folder):
    return {"driver": "file", "path": f"{folder}/"}
  scheme, _, place = str(folder).partition("://")
  bucket, _, name = place.partition("/")
  spec = {"bucket": bucket, "path": name}
  if scheme == "gs":
    driver = os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs")
    return {"driver": driver, **spec}
  # What s3fs reads by itself.
  server = os.environ.get("AWS_ENDPOINT_URL_S3")
  if server := server or os.environ.get("AWS_ENDPOINT_URL"):
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    spec |= {"endpoint": server, "aws_region": region}
  return {"driver": "s3", **spec}


def describe_shape(shape: Iterable[int]) -> str:
  """Returns a shape such as `3x4`."""
  return "x".join(map(str, shape)) or "a number"


def digest(data: bytes) -> str:
  """Returns 32 hexadecimal digits that identify bytes."""
  return hashlib.blake2b(data, digest_size=16).hexdigest()
