"""The device mesh."""

import jax
import pytest
from jax.sharding import AxisType

from narvl_jax.errors import UserError
from narvl_jax.parallel import AXES, data_parallel_size, make_mesh
from narvl_jax.parallel.mesh import describe


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


@pytest.mark.parametrize("data", [0, -2, 9])
def test_more_devices_than_there_are(data):
  with pytest.raises(
    UserError,
    match=rf"mesh.data={data} does not fit 8 device\(s\); .*1 to 8: --config",
  ):
    make_mesh(data)
