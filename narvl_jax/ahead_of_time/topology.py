"""TPU topologies to compile for on a machine without a TPU.

The compiler is in `libtpu` and needs no device. The tables have published
figures; all estimates of seconds use them.
"""

import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from narvl_jax.command_line.cli import LIBTPU_WITHOUT_TPU
from narvl_jax.errors import UserError, did_you_mean

_GB = 10**9
_GIB = 2**30

# Shapes of one slice: https://cloud.google.com/tpu/docs/v5e, /v6e, /v5p, /v4.
# The compiler does not support a single chip, 1x1.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")


def _cubes(largest: int, most_chips: int) -> tuple[str, ...]:
  """Returns shapes made of 4x4x4 cubes, and those within one cube."""
  sides = range(4, largest + 1, 4)
  return _SMALL_CUBES + tuple(
    "x".join(map(str, shape))
    for shape in itertools.combinations_with_replacement(sides, 3)
    if math.prod(shape) <= most_chips
  )


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a generation, as published.

  Attributes:
    shapes: of slices.
    peak_flops: dense bf16, per second.
    hbm_bytes: memory that the compiler allows a program, a little less than
      the published size.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second over all links, both directions together.
    dcn_bandwidth: bytes per second of a chip's share of the data-centre
      network, one direction; None if unknown.
    clock: cycles per second. Not published: inferred from the peak and the
      operations per cycle at which the compiler's estimate saturates.
    options: other arguments of JAX's topology description.
  """

  shapes: tuple[str, ...]
  peak_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  ici_bandwidth: float
  dcn_bandwidth: float | None
  clock: float
  options: tuple[tuple[str, Any], ...] = ()


# Peak, HBM and ICI per chip: the tables "System architecture" of the pages
# above. v5e gives 6.4 Tbit/s of data-centre network for 256 chips, v5p 50
# Gbit/s a chip. ICI of v4: 6 links of 50 GB/s each way (arXiv 2304.01433).
CHIPS: dict[str, Chip] = {
  "v4": Chip(
    shapes=_cubes(16, 4096),
    peak_flops=275e12,
    hbm_bytes=int(30.75 * _GIB),  # of 32 GiB
    hbm_bandwidth=1200 * _GB,
    ici_bandwidth=600 * _GB,
    dcn_bandwidth=None,
    clock=1.05e9,
    # Both cores of a chip as one device.
    options=(("chip_config_name", "megacore"),),
  ),
  "v5e": Chip(
    shapes=_FLAT,
    peak_flops=197e12,
    hbm_bytes=int(15.75 * _GIB),  # of 16 GB
    hbm_bandwidth=819 * _GB,
    ici_bandwidth=400 * _GB,
    dcn_bandwidth=25e9 / 8,
    clock=1.5e9,
  ),
  "v5p": Chip(
    shapes=_cubes(24, 6144),
    peak_flops=459e12,
    hbm_bytes=int(95.74 * _GIB),  # of 95 GiB, and the compiler says more
    hbm_bandwidth=2765 * _GB,
    ici_bandwidth=1200 * _GB,
    dcn_bandwidth=50e9 / 8,
    clock=1.75e9,
  ),
  "v6e": Chip(
    shapes=_FLAT,
    peak_flops=918e12,
    hbm_bytes=int(31.25 * _GIB),  # of 32 GB
    hbm_bandwidth=1638 * _GB,
    ici_bandwidth=800 * _GB,
    dcn_bandwidth=None,
    clock=1.75e9,
  ),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips to compile for.

  Attributes:
    name: of each slice, such as "v5e:4x4".
    num_slices: number of slices.
    chip: the kind of chip.
    devices: one per chip; they cannot run anything.
  """

  name: str
  num_slices: int
  chip: Chip
  devices: Sequence[Any]


def get_topology(name: str, num_slices: int = 1) -> Topology:
  """Returns a topology.

  Call it before anything uses a device, because it switches JAX to the CPU.

  Args:
    name: CHIP:SHAPE, such as "v5e:16x16" or "v5p:4x4x4".
    num_slices: number of slices.

  Raises:
    UserError: there is no such topology, or libtpu is not installed.
  """
  chip = check_name(name)
  if num_slices < 1:
    raise UserError(f"num_slices={num_slices} is below 1: --num_slices=1")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      "compiling for a TPU needs the package libtpu:"
      ' pip install "narvl_jax[aot]"'
    )
  _prepare()
  # Here, because no other command needs it.
  from jax.experimental import topologies

  options: dict[str, Any] = dict(chip.options)
  if num_slices > 1:
    options["num_slices"] = num_slices
  description = topologies.get_topology_desc(
    platform="tpu", topology_name=name, **options
  )
  return Topology(name, num_slices, chip, description.devices)


def check_name(name: str) -> Chip:
  """Returns the chip of a topology's name.

  Raises:
    UserError: there is no such topology.
  """
  kind, _, shape = name.partition(":")
  if kind not in CHIPS:
    raise UserError(
      f'topology "{name}" does not exist: no chip "{kind}".'
      f"{did_you_mean(kind, CHIPS)} (--topology=CHIP:SHAPE, such as"
      " v5e:16x16)"
    )
  chip = CHIPS[kind]
  if shape in chip.shapes:
    return chip
  near = " or ".join(f"{kind}:{s}" for s in _nearest_shapes(shape, chip))
  raise UserError(
    f'topology "{name}" does not exist; nearest: {near} (--topology)'
  )


def _nearest_shapes(shape: str, chip: Chip) -> list[str]:
  """Returns the two shapes with the nearest number of chips."""
  sides = [int(n) for n in re.findall(r"\d+", shape)] or [1]

  def distance(candidate: str) -> float:
    wanted, chips = max(math.prod(sides), 1), _chips(candidate)
    return abs(math.log(chips / wanted))

  return sorted(chip.shapes, key=distance)[:2]


def _chips(shape: str) -> int:
  return math.prod(int(n) for n in shape.split("x"))


def _prepare() -> None:
  """Keeps libtpu from searching for a TPU and from writing logs."""
  os.environ.update(
    {
      **LIBTPU_WITHOUT_TPU,
      # Several compilations may run at once.
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
  )
  jax.config.update("jax_platforms", "cpu")
