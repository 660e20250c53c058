"""Whether a checkpoint fits a model, told before its arrays are read."""

import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.checkpointing.record import (
  ArrayRecord,
  CheckpointRecord,
  describe_shape,
  item_of,
)
from narvl_jax.errors import UserError

# Arrays of each kind that a message names.
_SHOWN = 3


def leaf_of(array: Any, checksum: str = "") -> ArrayRecord:
  """Returns shape and dtype of an array as a record has them."""
  return ArrayRecord(tuple(array.shape), str(array.dtype), checksum)


def check_fit(
  record: CheckpointRecord,
  wanted: Mapping[str, Any],
  workdir: pathlib.Path,
  *,
  dtypes: bool = True,
) -> None:
  """Compares the arrays of a checkpoint with those that a model needs.

  Args:
    record: of the checkpoint.
    wanted: name -> shape and dtype; items of which nothing is wanted may be in
      the checkpoint.
    workdir: of the run, for the message.
    dtypes: whether dtypes must be the same.

  Raises:
    UserError: naming what is missing, unexpected or different, the nearest
      names, and the flags of a run that may start from such a checkpoint.
  """
  items = {item_of(name) for name in wanted}
  there = {
    name: leaf for name, leaf in record.leaves.items() if item_of(name) in items
  }
  missing = sorted(wanted.keys() - there.keys())
  unexpected = sorted(there.keys() - wanted.keys())
  different = [
    difference
    for name in sorted(wanted.keys() & there.keys())
    if (difference := _differ(name, there[name], leaf_of(wanted[name]), dtypes))
  ]
  if not (missing or unexpected or different):
    return
  parts = (
    _shorten("missing there", [_with_near(x, unexpected) for x in missing]),
    _shorten("unknown here", unexpected),
    _shorten("different", different),
  )
  raise UserError(
    f"the checkpoint of step {record.step} in {workdir} is of another model:"
    f" {'; '.join(filter(None, parts))}; what fits of its weights is taken by"
    f" --config.init_from={workdir} with another --workdir,"
    " --config.init_renames for other names and --config.init_drops for what"
    " is to start fresh"
  )


def _differ(
  name: str, there: ArrayRecord, here: ArrayRecord, dtypes: bool
) -> str:
  if there.shape != here.shape:
    shapes = describe_shape(there.shape), describe_shape(here.shape)
    return "{} has {} there and {} here".format(name, *shapes)
  if dtypes and there.dtype != here.dtype:
    return f"{name} is {there.dtype} there and {here.dtype} here"
  return ""


def _with_near(name: str, others: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
  return f"{name} (near: {near[0]})" if near else name


def _shorten(kind: str, found: Sequence[str]) -> str:
  if not found:
    return ""
  more = len(found) - _SHOWN
  text = f"{kind}: {', '.join(found[:_SHOWN])}"
  return text + (f" and {more} more" if more > 0 else "")
