"""Names of topologies, and their devices."""

import importlib.util
import math

import pytest

from narvl_jax.ahead_of_time import topology
from narvl_jax.errors import UserError
from narvl_jax.parallel import make_mesh


@pytest.mark.parametrize(
  "name", ["v5e:2x2", "v5e:16x16", "v5p:4x4x4", "v5p:16x16x24", "v4:2x2x1"]
)
def test_names_that_exist(name: str):
  assert topology.check_name(name) is topology.CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e:3x3", "nearest: v5e:2x4 or v5e:4x4"),
    ("v5e:32x32", "nearest: v5e:16x16 or v5e:8x16"),
    ("v5p:4x4", "nearest: v5p:2x2x4 or "),
    ("v5e", "nearest: v5e:2x2 or v5e:2x4"),
    ("v5x:4x4", 'no chip "v5x". Did you mean "v5'),
    ("", 'no chip ""'),
  ],
)
def test_names_that_do_not_exist(name: str, message: str):
  with pytest.raises(UserError, match="does not exist") as error:
    topology.get_topology(name)
  assert message in str(error.value)
  assert "--topology" in str(error.value)


def test_number_of_slices():
  with pytest.raises(UserError, match="num_slices=0 is below 1"):
    topology.get_topology("v5e:2x2", 0)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r'pip install "narvl_jax\[aot\]"'):
    topology.get_topology("v5e:2x2")


def test_every_chip_has_sensible_figures():
  for chip in topology.CHIPS.values():
    assert 1e14 < chip.peak_flops < 1e16
    assert 2**33 < chip.hbm_bytes < 2**38
    # Operations per cycle of the matrix units: a power of two.
    per_cycle = chip.peak_flops / chip.clock
    assert per_cycle == pytest.approx(
      2 ** round(math.log2(per_cycle)), rel=0.01
    )


def test_devices_of_two_slices_make_a_mesh():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  found = topology.get_topology("v5e:2x2", 2)
  assert len(found.devices) == 8
  mesh = make_mesh(-1, 4, devices=found.devices)
  assert mesh.shape == {"data": 2, "fsdp": 4, "tensor": 1}
  slices = [device.slice_index for device in mesh.devices.flat]
  assert slices == [0] * 4 + [1] * 4
