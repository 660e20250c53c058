"""Checks of logits and targets, and which targets fit the queries."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from narvl_jax.errors import UserError


def as_int32(x: Any) -> jax.Array:
  """Returns integers of any dtype as int32, clipped to its range.

  JAX converts a Python number to the dtype of the array it is compared with:
  beside int8 labels, 300 classes would become 44.
  """
  # Without `jax_enable_x64`, JAX would cut bits off 64-bit NumPy arrays.
  library: Any = jnp if isinstance(x, jax.Array) else np
  x = library.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.integer):
    raise UserError(f"labels and lengths must be integers, got {x.dtype}")
  ends, given = jnp.iinfo(jnp.int32), jnp.iinfo(x.dtype)
  if given.max > ends.max:
    x = library.minimum(x, ends.max)
  if given.min < ends.min:
    x = library.maximum(x, ends.min)
  return jnp.asarray(x.astype(np.int32))


def feasible(
  labels: jax.Array, label_lengths: jax.Array, num_queries: int
) -> jax.Array:
  """bool [B]: N queries suffice, N >= length + adjacent repeats.

  Args:
    labels: [B, L] integers, right padded.
    label_lengths: [B] integers.
    num_queries: N.
  """
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  inside = jnp.arange(1, labels.shape[1]) < label_lengths[:, None]
  repeats = jnp.sum((labels[:, 1:] == labels[:, :-1]) & inside, axis=1)
  return label_lengths + repeats <= num_queries


def is_target(
  labels: jax.Array,
  label_lengths: jax.Array,
  vocab_size: int,
  blank_id: int | None = None,
) -> jax.Array:
  """bool [B]: all labels are classes other than blank, and lengths in 0..L.

  Args:
    labels: [B, L] integers, right padded with any id.
    label_lengths: [B] integers.
    blank_id: id of the blank class, None if there is none.
  """
  labels, label_lengths = as_int32(labels), as_int32(label_lengths)
  width = labels.shape[1]
  padding = jnp.arange(width) >= label_lengths[:, None]
  known = (labels >= 0) & (labels < vocab_size)
  if blank_id is not None:
    known &= labels != blank_id
  fits = (label_lengths >= 0) & (label_lengths <= width)
  return fits & jnp.all(known | padding, axis=1)


def check_classes(
  classes: int, vocab_size: int | None, blank_id: int | None = None
) -> int:
  """Returns the number of true classes.

  Raises:
    UserError: `vocab_size` or `blank_id` is out of range.
  """
  size = classes if vocab_size is None else vocab_size
  if not 0 < size <= classes:
    raise UserError(
      f"vocab_size {size} does not fit logits of {classes} classes;"
      f" give 1 to {max(classes, 1)}"
    )
  if blank_id is not None and not 0 <= blank_id < size:
    raise UserError(f"blank_id {blank_id} is not a class; give 0 to {size - 1}")
  return size


def check_smoothing(label_smoothing: float) -> None:
  """Raises UserError for a value outside [0, 1)."""
  if not 0.0 <= label_smoothing < 1.0:
    raise UserError(
      f"label smoothing {label_smoothing} is outside [0, 1); set"
      " --config.loss.label_smoothing, for example to 0.1"
    )


def check_targets(
  labels: Any,
  label_lengths: Any,
  vocab_size: int,
  blank_id: int | None = None,
  *,
  example_mask: Any = None,
  confidence: Any = None,
) -> None:
  """Rejects wrong targets.

  Values are checked only if they are known: under a trace only shapes and
  dtypes are, and `is_target` checks the values.

  Args:
    labels: [B, L] integers.
    label_lengths: [B] integers.
    blank_id: id of the blank class, None if there is none.
    example_mask: [B], False for rows whose values are not checked, or None.
    confidence: [B] or None.

  Raises:
    UserError: a shape, a dtype or a value is wrong.
  """
  batch = labels.shape[:1]
  for name, x in (
    ("label_lengths", label_lengths),
    ("example_mask", example_mask),
    ("confidence", confidence),
  ):
    if x is not None and x.shape != batch:
      raise UserError(f"{name} needs the shape [B] = {batch}, got {x.shape}")
  for name, x in (("labels", labels), ("label_lengths", label_lengths)):
    if not jnp.issubdtype(x.dtype, jnp.integer):
      raise UserError(f"{name} must be integers, got {x.dtype}")
  if not all(_is_known(x) for x in (labels, label_lengths, example_mask)):
    return
  labels, lengths = np.asarray(labels), np.asarray(label_lengths)
  if example_mask is not None:
    lengths = np.where(np.asarray(example_mask), lengths, 0)
  width = labels.shape[1]
  wrong = (lengths < 0) | (lengths > width)
  if wrong.any():
    row = int(np.argmax(wrong))
    raise UserError(
      f"label length {lengths[row]} of example {row} is outside 0 to {width},"
      " the width of labels"
    )
  wrong = (labels < 0) | (labels >= vocab_size) | (labels == blank_id)
  wrong &= np.arange(width) < lengths[:, None]
  if wrong.any():
    row, place = (int(i) for i in np.argwhere(wrong)[0])
    but = "" if blank_id is None else f", but not blank ({blank_id})"
    raise UserError(
      f"label {labels[row, place]} of example {row} at place {place} is not a"
      f" class that a target may contain: 0 to {vocab_size - 1}{but}"
    )


def _is_known(x: Any) -> bool:
  """Whether the values are known on this host."""
  if isinstance(x, jax.core.Tracer):
    return False
  return not isinstance(x, jax.Array) or x.is_fully_addressable
