"""Weights and inputs that depend on names alone.

Every value is a hash of the tensor's official name and its index, so numbers
that the official code printed for these weights can be checked without a
file.
"""

import zlib
from collections.abc import Mapping

import numpy as np

TABLE = "encoder.embed_tokens.weight"
_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")


def noise(name: str, size: int) -> np.ndarray:
  """`size` values in [-1, 1), float64, that only depend on the name."""
  x = np.arange(size, dtype=np.uint32)
  x += np.uint32(zlib.crc32(name.encode()))
  x ^= x >> 16
  x *= np.uint32(0x7FEB352D)
  x ^= x >> 15
  x *= np.uint32(0x846CA68B)
  x ^= x >> 16
  return x / 2.0**31 - 1.0


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The float32 values of one official tensor; the first rule that fits."""
  v = noise(TABLE if name in _TIED else name, int(np.prod(shape)))
  v = v.reshape(shape)
  if name.endswith("running_var"):
    v = 1 + 0.5 * np.abs(v)
  elif name.endswith("running_mean"):
    v *= 0.1
  elif name.endswith("c_attn"):
    v = 1 + 0.2 * v
  elif v.ndim == 1 and name.endswith("weight"):
    v = 1 + 0.1 * v
  elif v.ndim == 1:
    v *= 0.1
  elif v.ndim == 4:
    v *= np.sqrt(6 / np.prod(shape[1:]))
  elif "rel_pos_table" in name or "embed" in name:
    v *= 0.5
  else:
    v *= np.sqrt(3 / shape[1])
  return v.astype(np.float32)


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Fills a whole state dict; the tied tables are one array."""
  state = {k: tensor(k, s) for k, s in shapes.items() if k not in _TIED}
  return state | {key: state[TABLE] for key in _TIED}
