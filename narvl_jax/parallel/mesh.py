"""The device mesh: axes `data`, `fsdp` and `tensor`."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from narvl_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, *, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the mesh of all axes in `AXES`; only `data` is wider than one.

  Args:
    data: number of devices on the `data` axis; -1 takes every device.
    devices: the devices to use, all visible ones by default.

  Returns:
    A mesh whose axis types are Auto: logical constraints of Flax modules need
    the compiler to propagate shardings.

  Raises:
    UserError: if `data` is neither -1 nor between 1 and the device count.
  """
  devices = list(jax.devices() if devices is None else devices)
  size = len(devices) if data == -1 else data
  if not 1 <= size <= len(devices):
    raise UserError(
      f"mesh.data={data} does not fit {len(devices)} device(s); use -1 for"
      f" all or 1 to {len(devices)}: --config.mesh.data=-1"
    )
  return jax.make_mesh(
    (size, 1, 1),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:size],
  )


def data_parallel_size(mesh: Mesh) -> int:
  """Returns the number of parts that a batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def describe(mesh: Mesh) -> str:
  """Returns a line such as `data=8 fsdp=1 tensor=1 on 8 x cpu`."""
  axes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
  kind = mesh.devices.flat[0].device_kind
  return f"{axes} on {mesh.size} x {kind}"
