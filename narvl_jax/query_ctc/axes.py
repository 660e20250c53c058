"""Batch and vocabulary split over the axes of a device mesh.

Split computations run under `jax.shard_map`, one program per device, so that
the only collectives are those written here. Without a mesh in the context, or
with axes of size 1, nothing is split, and the same code runs directly.
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

  Names that the mesh of `jax.set_mesh` does not have are ignored.

  Attributes:
    batch: axes that split the examples of [B, N, V].
    vocab: axis that splits the classes, None for none.
    width: the axis of `batch` that splits the columns of the table [V, D],
      None for none. The table is gathered over it, as under fsdp, and its
      gradient is scattered.
  """

  batch: tuple[str, ...] = ()
  vocab: str | None = None
  width: str | None = None


@dataclasses.dataclass(frozen=True)
class Split:
  """The axes of `MeshAxes` that split given arrays.

  All methods but `run` are called in the program of one device.

  Attributes:
    batch: mesh axes of the examples.
    vocab: mesh axis of the classes, None if every device has all classes.
    width: mesh axis of the columns of the table's gradient, None for none.
    inside: whether `run` is already called in the program of one device.
  """

  batch: tuple[str, ...] = ()
  vocab: str | None = None
  width: str | None = None
  inside: bool = False

  @property
  def rows(self) -> PartitionSpec:
    """Spec of an array whose first axis is the batch."""
    return PartitionSpec(self.batch or None)

  @property
  def logits(self) -> PartitionSpec:
    """Spec of [B, N, V]."""
    return PartitionSpec(self.batch or None, None, self.vocab)

  @property
  def table(self) -> PartitionSpec:
    """Spec of [V, D], with all columns."""
    return PartitionSpec(self.vocab)

  @property
  def table_gradient(self) -> PartitionSpec:
    """Spec of the gradient of [V, D]."""
    return PartitionSpec(self.vocab, self.width)

  def run(
    self,
    function: Callable[..., Any],
    *args: Any,
    in_specs: tuple[PartitionSpec, ...],
    out_specs: Any,
  ) -> Any:
    """Calls a function on the parts of every device.

    A spec applies to all arrays of its argument.
    """
    if self.inside or (not self.batch and self.vocab is None):
      return function(*args)
    # Replication over the other axes follows from the collectives. JAX's check
    # of it does not support loops that start from constants.
    return jax.shard_map(
      function, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(*args)

  def first_class(self, local_classes: int) -> int | jax.Array:
    """Returns the id of this device's first class."""
    if self.vocab is None:
      return 0
    return jax.lax.axis_index(self.vocab) * local_classes

  def true_classes(
    self, vocab_size: int, local_classes: int
  ) -> int | jax.Array:
    """Returns how many classes of this device are not padding."""
    if self.vocab is None:
      return vocab_size
    if local_classes * jax.lax.axis_size(self.vocab) == vocab_size:
      return local_classes
    first = self.first_class(local_classes)
    return jnp.clip(vocab_size - first, 0, local_classes)

  def local_ids(self, ids: jax.Array, local_classes: int) -> jax.Array:
    """Returns class ids relative to this device; `local_classes` if absent."""
    if self.vocab is None:
      return ids
    ids = ids - self.first_class(local_classes)
    here = (ids >= 0) & (ids < local_classes)
    return jnp.where(here, ids, local_classes)

  def sum_over_classes(self, x: Any) -> Any:
    """Sums over the devices that split the classes."""
    return x if self.vocab is None else jax.lax.psum(x, self.vocab)

  def sum_over_batch(self, x: jax.Array) -> jax.Array:
    """Sums the table's gradient [V, D]; returns this device's columns."""
    if self.width is not None:
      # Split explicitly: XLA for TPUs would sum all columns and drop most.
      parts = x.reshape(len(x), jax.lax.axis_size(self.width), -1)
      x = jax.lax.psum_scatter(parts.swapaxes(0, 1), self.width)
    rest = tuple(name for name in self.batch if name != self.width)
    return jax.lax.psum(x, rest) if rest else x

  def join(self, part: Normalizer) -> Normalizer:
    """Combines the devices' normalizers to that over all classes."""
    if self.vocab is None:
      return part
    shift = jax.lax.pmax(part.shift, self.vocab)
    mass = jnp.exp(part.shift - zero_if_none(shift) + part.log_mass)
    return Normalizer(shift, jnp.log(self.sum_over_classes(mass)))


def split_of(
  axes: MeshAxes, batch_size: int, classes: int, width: int = 0
) -> Split:
  """Returns how the mesh of the context splits [batch_size, N, classes].

  A batch or a width that does not divide by its axes is not split.

  Raises:
    UserError: the classes do not divide by their axis.
  """
  mesh = jax.sharding.get_abstract_mesh()
  # Inside a shard_map, arrays are already split over the manual axes.
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
