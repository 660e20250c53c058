"""The device mesh: axes `data`, `fsdp` and `tensor`, and several slices.

`data` splits the batch and replicates the parameters, `fsdp` splits both, and
`tensor` splits heads, feed-forward blocks and vocabulary. Slices are pods that
are connected only by a data-centre network; `data` runs across them.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from narvl_jax.errors import UserError

AXES: tuple[str, ...] = ("data", "fsdp", "tensor")
# The axes that split the batch.
BATCH_AXES: tuple[str, ...] = ("data", "fsdp")
# The axes over which loss and decoding split the rows and the columns of the
# vocabulary table.
VOCAB_AXIS = "tensor"
WIDTH_AXIS = "fsdp"

# Axis -> size.
MeshShape = Mapping[str, int]


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  *,
  slices: int = -1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Builds the mesh, with neighbours in it close to each other in the network.

  Args:
    data: size of the axis, over all slices; -1 for all remaining devices.
    fsdp: size of the axis, or -1.
    tensor: size of the axis, or -1.
    slices: number of slices, -1 for those that the devices report. CPU devices
      are divided into any number of slices, to try a program.
    devices: devices to use; all by default. A single process may leave out
      some of its own.

  Returns:
    A mesh with axes of type Auto: logical constraints of Flax modules need the
    compiler to propagate shardings.

  Raises:
    UserError: the sizes do not fit the devices; the error names the nearest
      valid ones.
  """
  devices = list(jax.devices() if devices is None else devices)
  hosts = {device.process_index for device in devices}
  shape = resolve_shape(
    data, fsdp, tensor, len(devices), every_device=len(hosts) > 1
  )
  devices = devices[: math.prod(shape)]
  groups = _slices(devices, slices)
  if shape[0] % len(groups):
    near = _nearest_multiple(shape[0], len(groups))
    raise UserError(
      f"mesh.data={shape[0]} does not divide by {len(groups)} slices, over"
      f" which it runs; nearest: {near}: --config.mesh.data={near}"
    )
  within = (shape[0] // len(groups), *shape[1:])
  # `data` is the outermost axis, so that slices follow one another on it.
  arranged = [
    mesh_utils.create_device_mesh(
      within, group, allow_split_physical_axes=group[0].platform == "tpu"
    )
    for group in groups
  ]
  return Mesh(
    np.concatenate(arranged), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def mesh_from_config(
  settings: Any, devices: Sequence[Any] | None = None
) -> Mesh:
  """Builds the mesh of `config.mesh`, see `make_mesh`."""
  return make_mesh(
    settings.data,
    settings.fsdp,
    settings.tensor,
    slices=settings.slices,
    devices=devices,
  )


def resolve_shape(
  data: int,
  fsdp: int,
  tensor: int,
  device_count: int,
  *,
  every_device: bool = True,
) -> tuple[int, int, int]:
  """Returns the sizes of the axes with -1 inferred.

  Args:
    data: size of the axis; at most one of the three is -1.
    fsdp: size of the axis.
    tensor: size of the axis.
    device_count: number of devices.
    every_device: whether all of them must be used.

  Raises:
    UserError: the sizes do not fit; the error names the nearest valid ones.
  """
  asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
  fixed = math.prod(size for size in asked.values() if size != -1)
  inferred = [axis for axis, size in asked.items() if size == -1]
  if all(size == -1 or size > 0 for size in asked.values()):
    if len(inferred) == 1 and device_count % fixed == 0:
      asked[inferred[0]] = device_count // fixed
      return asked["data"], asked["fsdp"], asked["tensor"]
    whole = fixed == device_count
    if not inferred and (whole or (fixed < device_count and not every_device)):
      return data, fsdp, tensor
  if len(inferred) > 1:
    why = f"has {len(inferred)} axes of -1, and only one can be inferred"
  else:
    why = f"does not fit {device_count} device(s)"
  near = nearest_shape(asked, shapes_of(device_count))
  assert near is not None
  flags = [
    f"--config.mesh.{axis}={near[axis]}"
    for axis in AXES
    if near[axis] != asked[axis]
  ]
  raise UserError(
    f"mesh {format_shape(asked)} {why}; nearest: {format_shape(near)}: "
    + " ".join(flags)
  )


def shapes_of(device_count: int) -> Iterator[dict[str, int]]:
  """Yields every mesh shape for a number of devices."""
  divisors = [n for n in range(1, device_count + 1) if device_count % n == 0]
  for fsdp, tensor in itertools.product(divisors, divisors):
    if device_count % (fsdp * tensor) == 0:
      data = device_count // (fsdp * tensor)
      yield {"data": data, "fsdp": fsdp, "tensor": tensor}


def nearest_shape(
  asked: MeshShape, candidates: Iterator[dict[str, int]]
) -> dict[str, int] | None:
  """Returns the candidate whose sizes differ by the smallest factors.

  `data` has a small weight, since it affects neither memory nor rules. An axis
  of -1 may have any size.
  """

  def distance(shape: MeshShape) -> float:
    weights = {"data": 0.25, "fsdp": 1.0, "tensor": 1.0}
    return sum(
      weights[axis] * abs(math.log(shape[axis] / max(asked[axis], 1)))
      for axis in AXES
      if asked[axis] != -1
    )

  return min(candidates, key=distance, default=None)


def data_parallel_size(mesh: Mesh) -> int:
  """Returns the number of parts into which a batch is split."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def format_shape(shape: MeshShape) -> str:
  """Returns a mesh shape as `data=8 fsdp=1 tensor=1`."""
  return " ".join(f"{axis}={shape[axis]}" for axis in AXES)


def describe(mesh: Mesh) -> str:
  """Returns a line such as `data=8 fsdp=1 tensor=1 on 8 x cpu`."""
  kind = mesh.devices.flat[0].device_kind
  text = f"{format_shape(mesh.shape)} on {mesh.size} x {kind}"
  found = {_slice_index(device) for device in mesh.devices.flat}
  return text + (f" in {len(found)} slices" if len(found) > 1 else "")


def _slices(devices: Sequence[Any], wanted: int) -> list[list[Any]]:
  """Groups the devices by slice."""
  groups = defaultdict(list)
  for device in devices:
    groups[_slice_index(device)].append(device)
  found = [groups[index] for index in sorted(groups)]
  if wanted in (-1, len(found)):
    return found
  count = len(devices)
  pretended = len(found) == 1 and devices[0].platform == "cpu"
  if not pretended or wanted < 1 or count % wanted:
    raise UserError(
      f"mesh.slices={wanted} does not fit {count} device(s) in"
      f" {len(found)} slice(s): --config.mesh.slices=-1"
    )
  size = count // wanted
  return [list(devices[i : i + size]) for i in range(0, count, size)]


def _slice_index(device: Any) -> int:
  return getattr(device, "slice_index", None) or 0


def _nearest_multiple(value: int, factor: int) -> int:
  return max(1, round(value / factor)) * factor
