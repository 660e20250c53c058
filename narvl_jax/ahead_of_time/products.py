"""Operations of matrix products and convolutions in compiled programs."""

import functools
import math
import re
from collections.abc import Mapping

from narvl_jax.ahead_of_time.hlo import Instruction, find_arrays


def product_flops(i: Instruction, types: Mapping[str, str]) -> float:
  """Returns the operations of an instruction; 0 unless it is a product.

  Args:
    i: the instruction.
    types: name -> type of the instructions of its computation.
  """
  if i.opcode == "dot":
    (left,), (out,) = find_arrays(types[i.operands[0]]), find_arrays(i.type)
    dims = (i.attribute("lhs_contracting_dims") or "{}").strip("{}")
    depth = math.prod(left.shape[int(d)] for d in dims.split(",") if d)
    return 2.0 * depth * out.size
  if i.opcode == "convolution":
    return _convolution_flops(i, types)
  return 0.0


def _convolution_flops(i: Instruction, types: Mapping[str, str]) -> float:
  """Counts multiply-adds without those of padding and dilation.

  TPU programs express matrix products as convolutions, and batch dimensions
  as spatial ones.
  """
  (left,), (right,) = (find_arrays(types[name]) for name in i.operands[:2])
  (out,) = find_arrays(i.type)
  labels = re.match(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels") or "")
  assert labels is not None, i.attributes[:200]
  lhs, rhs, result = labels.groups()
  window = dict(
    item.split("=")
    for item in re.findall(r"\w+=[\w\-]+", i.attribute("window") or "")
  )
  count = 2.0 * left.shape[lhs.index("b")] * out.shape[result.index("f")]
  count *= right.shape[rhs.index("i")]
  count /= int(i.attribute("batch_group_count") or 1)
  for dim in sorted(set(lhs) - {"b", "f"}):
    index = int(dim)
    count *= _valid_positions(
      left.shape[lhs.index(dim)],
      right.shape[rhs.index(dim)],
      out.shape[result.index(dim)],
      _window(window, "stride", index, (1,)),
      _window(window, "pad", index, (0, 0)),
      _window(window, "lhs_dilate", index, (1,)),
      _window(window, "rhs_dilate", index, (1,)),
    )
  return count


def _window(
  window: Mapping[str, str], name: str, index: int, default: tuple[int, ...]
) -> tuple[int, ...]:
  if name not in window:
    return default
  return tuple(int(n) for n in window[name].split("x")[index].split("_"))


@functools.cache
def _valid_positions(
  size: int,
  kernel: int,
  out: int,
  stride: tuple[int, ...],
  pad: tuple[int, ...],
  lhs_dilate: tuple[int, ...],
  rhs_dilate: tuple[int, ...],
) -> int:
  """Counts pairs of output and kernel positions with an input element."""
  dilation, last = lhs_dilate[0], (size - 1) * lhs_dilate[0]
  count = 0
  for k in range(kernel):
    for o in range(out):
      place = o * stride[0] + k * rhs_dilate[0] - pad[0]
      count += 0 <= place <= last and place % dilation == 0
  return count
