"""Checksums of arrays, equal on every mesh and on the host.

The words of an array are mixed with their position by an invertible function
and summed modulo 2^32. One changed word always changes the sum. Integer sums
do not depend on the order, hence not on the sharding.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from narvl_jax.hosts import distributed

# Words summed at a time on the host, to bound the memory.
_BLOCK = 1 << 20
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}


def device_checksums(leaves: Sequence[Any]) -> np.ndarray:
  """Computes checksums on the devices; waits for them.

  Args:
    leaves: arrays of any shape and any dtype but complex ones, also typed
      random keys; those on devices must share a mesh. All processes must call.

  Returns:
    uint32 [len(leaves), 2], see `text`.
  """
  if not leaves:
    return np.zeros((0, 2), np.uint32)
  # One program: many small ones with collectives can deadlock on the threads
  # of a CPU.
  program = _program(_whole(leaves))
  if jax.process_count() > 1:
    program = _compiled_together(program, tuple(map(_spec, leaves)))
  return np.asarray(program(list(leaves)))


def host_checksum(array: np.ndarray) -> np.ndarray:
  """Returns the checksum, uint32 [2], of an array on the host."""
  dtype = _WORDS[array.dtype.itemsize]
  words = np.ascontiguousarray(array).reshape(-1).view(dtype)
  total = np.zeros(2, np.uint32)
  for start in range(0, words.size, _BLOCK):
    block = words[start : start + _BLOCK].astype(np.uint32)
    places = np.arange(start, start + block.size, dtype=np.uint64)
    terms = _terms(block, places.astype(np.uint32))
    total += [np.sum(term, dtype=np.uint32) for term in terms]
  return total


def text(checksum: np.ndarray) -> str:
  """Returns a checksum, uint32 [2], as 16 hexadecimal digits."""
  return "".join(f"{int(part):08x}" for part in checksum)


def _terms(words: Any, places: Any) -> tuple[Any, Any]:
  """Returns the uint32 terms of the two sums.

  The first sum alone would miss some changes of two words, such as two flipped
  signs: the highest bit times an odd number is the highest bit. The second one
  is the finalizer of MurmurHash3 of word and position.
  """
  mixed = words ^ (places * np.uint32(0x9E3779B1))
  mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  mixed = mixed ^ (mixed >> np.uint32(16))
  return words * ((places << np.uint32(1)) | np.uint32(1)), mixed


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  """Returns uint32 [2] without a temporary of the size of the array."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    array = jax.random.key_data(array)
  if array.dtype == jnp.bool_:
    array = array.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize])
  words = words.astype(jnp.uint32)
  places = jnp.zeros(words.shape, jnp.uint32)
  for axis in range(words.ndim):
    stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
    place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    places += place * stride
  # One reduction: two would materialise what they share.
  return jnp.stack(
    jax.lax.reduce(
      _terms(words, places),
      (np.uint32(0), np.uint32(0)),
      lambda a, b: (a[0] + b[0], a[1] + b[1]),
      tuple(range(words.ndim)),
    )
  )


@functools.cache
def _program(where: Sharding | None) -> Any:
  return jax.jit(
    lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]),
    out_shardings=where,
  )


@functools.cache
def _compiled_together(program: Any, specs: tuple[Any, ...]) -> Any:
  """Compiles the program on all hosts before any host runs it.

  Gloo (CPU) gives a host 30 seconds for its first collective.
  """
  compiled = program.lower(list(specs)).compile()
  distributed.barrier("checksums compiled")
  return compiled


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(leaves: Sequence[Any]) -> Sharding | None:
  """Returns the sharding that replicates the result on the mesh."""
  for leaf in leaves:
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
      return NamedSharding(sharding.mesh, PartitionSpec())
  return None
