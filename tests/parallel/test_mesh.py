"""The device mesh."""

import dataclasses
import math
import re

import jax
import pytest
from jax.sharding import AxisType

from narvl_jax.errors import UserError
from narvl_jax.experiment.config import default_config
from narvl_jax.parallel import (
  AXES,
  data_parallel_size,
  make_mesh,
  mesh_from_config,
)
from narvl_jax.parallel.mesh import describe, resolve_shape, shapes_of


@dataclasses.dataclass(frozen=True)
class _Chip:
  """A device of some pod."""

  id: int
  process_index: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "chip"


def _pod(slices: int, per_slice: int, per_host: int = 4) -> list[_Chip]:
  return [
    _Chip(i, i // per_host, i // per_slice) for i in range(slices * per_slice)
  ]


def test_every_device_is_taken_by_default():
  mesh = make_mesh()
  assert mesh.axis_names == AXES == ("data", "fsdp", "tensor")
  assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert list(mesh.devices.flat) == jax.devices()
  assert mesh.axis_types == (AxisType.Auto,) * 3
  assert data_parallel_size(mesh) == 8


def test_fewer_devices():
  mesh = make_mesh(2)
  assert mesh.size == 2
  assert data_parallel_size(mesh) == 2
  assert describe(mesh) == "data=2 fsdp=1 tensor=1 on 2 x cpu"
  assert make_mesh(devices=jax.devices()[3:5]).size == 2


@pytest.mark.parametrize(
  ("asked", "resolved"),
  [
    ((-1, 1, 1), (8, 1, 1)),
    ((-1, 2, 2), (2, 2, 2)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 4, -1), (1, 4, 2)),
    ((8, 1, 1), (8, 1, 1)),
    ((1, 8, -1), (1, 8, 1)),
  ],
)
def test_one_axis_is_inferred(asked, resolved):
  assert resolve_shape(*asked, device_count=8) == resolved


def test_config_names_the_axes():
  config = default_config("vqa")
  config.mesh.update({"data": 2, "fsdp": -1, "tensor": 2})
  mesh = mesh_from_config(config.mesh)
  assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
  assert data_parallel_size(mesh) == 4


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (
      (0, 1, 1),
      "mesh data=0 fsdp=1 tensor=1 does not fit 8 device(s); nearest: data=8"
      " fsdp=1 tensor=1: --config.mesh.data=8",
    ),
    ((9, 1, 1), "nearest: data=8 fsdp=1 tensor=1: --config.mesh.data=8"),
    ((-2, 1, 1), "mesh data=-2 fsdp=1 tensor=1 does not fit 8"),
    ((-1, 3, 1), "nearest: data=2 fsdp=4 tensor=1: --config.mesh.data=2"),
    ((2, 4, 3), "nearest: data=1 fsdp=4 tensor=2:"),
    ((-1, -1, 1), "has 2 axes of -1, and only one can be inferred; nearest"),
    ((2, 2, 1), "does not fit 8 device(s); nearest: data=4 fsdp=2 tensor=1"),
  ],
)
def test_meshes_that_do_not_fit(asked, message):
  with pytest.raises(UserError, match=re.escape(message)):
    resolve_shape(*asked, device_count=8)


def test_one_host_may_leave_devices_out_but_several_may_not():
  assert resolve_shape(2, 2, 1, 8, every_device=False) == (2, 2, 1)
  with pytest.raises(UserError, match="does not fit 8 device"):
    make_mesh(4, devices=_pod(1, 8))


def test_shapes_of_some_devices():
  shapes = list(shapes_of(12))
  assert len({tuple(shape.values()) for shape in shapes}) == len(shapes) == 18
  assert all(math.prod(shape.values()) == 12 for shape in shapes)


def test_data_runs_across_slices():
  mesh = make_mesh(-1, 4, devices=_pod(2, 8))
  assert dict(mesh.shape) == {"data": 4, "fsdp": 4, "tensor": 1}
  assert describe(mesh).endswith("on 16 x chip in 2 slices")
  # A slice contains whole rows of the mesh, and the rows of a slice follow.
  slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
  assert slices == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


def test_cpu_devices_can_play_slices():
  mesh = make_mesh(-1, 2, slices=2)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
  assert [d.id for d in mesh.devices.flat] == list(range(8))


@pytest.mark.parametrize(
  ("arguments", "devices", "message"),
  [
    ((-1, 1, 1), (3, 4), r"mesh.slices=2 does not fit 12 device\(s\) in 3"),
    ((-1, 1, 1), (1, 8), r"mesh.slices=2 .* in 1 slice\(s\): .*slices=-1$"),
    ((1, 4, 2), (2, 4), "mesh.data=1 does not divide by 2 slices, .*data=2$"),
  ],
)
def test_slices_that_do_not_fit(arguments, devices, message):
  with pytest.raises(UserError, match=message):
    make_mesh(*arguments, slices=2, devices=_pod(*devices))


@pytest.mark.parametrize("slices", [0, 3])
def test_cpu_devices_cannot_be_dealt_out(slices):
  with pytest.raises(UserError, match=rf"mesh.slices={slices} does not fit 8"):
    make_mesh(slices=slices)
