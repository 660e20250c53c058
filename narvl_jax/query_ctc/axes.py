"""Batch and vocabulary split over the axes of a device mesh.

What is split runs under `jax.shard_map`, one program per device, so that no
collective appears but those written here. Without a mesh in the context, or
with axes of size 1, nothing is split and the same code runs as it is.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from narvl_jax.errors import UserError
from narvl_jax.query_ctc.log_space import Normalizer, zero_if_none


@dataclasses.dataclass(frozen=True)
class MeshAxes:
  """Names of the mesh axes over which logits and table are split.

  They count as far as the mesh of `jax.set_mesh` has them.

  Attributes:
    batch: axes that share the examples of [B, N, V].
    vocab: axis that shares the classes, None for none.
    width: the one of `batch` that shares the columns of the table [V, D],
      None for none. The table is gathered over it, as under fsdp, and its
      gradient scattered.
  """

  batch: tuple[str, ...] = ()
  vocab: str | None = None
  width: str | None = None


@dataclasses.dataclass(frozen=True)
class Split:
  """The axes of `MeshAxes` that split a given array.

  The methods besides `run` are for the program of one device.

  Attributes:
    batch: mesh axes.
    vocab: mesh axis, None if every device has all classes.
    width: mesh axis of the columns of the table's gradient, None for none.
  """

  batch: tuple[str, ...] = ()
  vocab: str | None = None
  width: str | None = None

  @property
  def rows(self) -> PartitionSpec:
    """Of an array whose first axis is the batch."""
    return PartitionSpec(self.batch or None)

  @property
  def logits(self) -> PartitionSpec:
    """Of [B, N, V]."""
    return PartitionSpec(self.batch or None, None, self.vocab)

  @property
  def table(self) -> PartitionSpec:
    """Of [V, D], with all columns."""
    return PartitionSpec(self.vocab)

  @property
  def table_gradient(self) -> PartitionSpec:
    """Of the gradient of [V, D]."""
    return PartitionSpec(self.vocab, self.width)

  def run(
    self,
    function: Callable[..., Any],
    *args: Any,
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
  ) -> Any:
    """Calls a function on the part of every device.

    Specs hold for all arrays of an argument.
    """
    if not self.batch and self.vocab is None:
      return function(*args)
    # Replication over the other axes follows from the collectives; the check
    # of it knows no loops that start from constants.
    return jax.shard_map(
      function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*args)

  def first_class(self, local_classes: int) -> int | jax.Array:
    """Returns the id of the first class that this device has."""
    if self.vocab is None:
      return 0
    return jax.lax.axis_index(self.vocab) * local_classes

  def true_classes(
    self, vocab_size: int, local_classes: int
  ) -> int | jax.Array:
    """Returns how many of the classes of this device are no padding."""
    if self.vocab is None:
      return vocab_size
    if local_classes * jax.lax.axis_size(self.vocab) == vocab_size:
      return local_classes
    first = self.first_class(local_classes)
    return jnp.clip(vocab_size - first, 0, local_classes)

  def local_ids(self, ids: jax.Array, local_classes: int) -> jax.Array:
    """Returns class ids as this device counts; `local_classes` if absent."""
    if self.vocab is None:
      return ids
    ids = ids - self.first_class(local_classes)
    here = (ids >= 0) & (ids < local_classes)
    return jnp.where(here, ids, local_classes)

  def sum_over_classes(self, x: Any) -> Any:
    """Adds up what the devices found in their classes."""
    return x if self.vocab is None else jax.lax.psum(x, self.vocab)

  def sum_over_batch(self, x: jax.Array) -> jax.Array:
    """Adds up the table's gradient [V, D]; leaves the own columns."""
    if self.width is not None:
      # Parts first: XLA for TPUs would sum all columns and then drop most.
      parts = x.reshape(len(x), jax.lax.axis_size(self.width), -1)
      x = jax.lax.psum_scatter(parts.swapaxes(0, 1), self.width)
    rest = tuple(name for name in self.batch if name != self.width)
    return jax.lax.psum(x, rest) if rest else x

  def join(self, part: Normalizer) -> Normalizer:
    """Joins the normalizers over the classes of every device."""
    if self.vocab is None:
      return part
    shift = jax.lax.pmax(part.shift, self.vocab)
    mass = jnp.exp(part.shift - zero_if_none(shift) + part.log_mass)
    return Normalizer(shift, jnp.log(self.sum_over_classes(mass)))


def split_of(
  axes: MeshAxes, batch_size: int, classes: int, width: int = 0
) -> Split:
  """Returns how the mesh of the context splits [batch_size, N, classes].

  A batch that does not divide by its axes is not split, nor is a width.

  Raises:
    UserError: the classes do not divide by their axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # Inside a shard_map the arrays are parts already.
  sizes = {
    name: size
    for name, size in mesh.shape.items()
    if size > 1 and name not in mesh.manual_axes
  }
  vocab = axes.vocab if axes.vocab in sizes else None
  batch = tuple(name for name in axes.batch if name in sizes)
  if batch_size % math.prod(sizes[name] for name in batch):
    batch = ()
  if vocab is not None and classes % sizes[vocab]:
    raise UserError(
      f'a table of {classes} rows does not divide by mesh axis "{vocab}" of'
      f" {sizes[vocab]}; pad it to {-(-classes // sizes[vocab]) * sizes[vocab]}"
      f" rows: --config.model.vocab_multiple={math.lcm(128, sizes[vocab])}"
    )
  columns = axes.width if axes.width in batch else None
  if columns is not None and (width == 0 or width % sizes[columns]):
    columns = None
  return Split(batch, vocab, columns)
