"""Checksums of arrays, the same on every mesh and on the host.

An array is taken as unsigned words. Each is mixed with its place in a way that
can be undone, and the results are summed modulo 2^32. So one changed word
always changes the sum; and sums of integers do not depend on their order, hence
not on how the array is split over devices.
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

# Words of a file that are summed at a time, which bounds the memory.
_BLOCK = 1 << 20
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}


def device_checksums(leaves: Sequence[Any]) -> np.ndarray:
  """Returns the checksums of arrays where they lie; waits for them.

  Args:
    leaves: arrays of any dtypes and shapes but complex ones, typed random keys
      as well; those on devices must share a mesh. All processes must call it.

  Returns:
    uint32 [len(leaves), 2], see `text`.
  """
  if not leaves:
    return np.zeros((0, 2), np.uint32)
  # One program: many small ones with collectives, in flight at once, can
  # starve each other of the threads of a CPU.
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
  """Returns what each of the two sums has of words, both uint32.

  The first sum alone would miss some changes of two words, such as two other
  signs: the highest bit times an odd number is the highest bit. So the second
  one scrambles each word, by steps that can be undone, after its place was
  mixed in.
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
  # Both at once: the compiler would write down what two sums share.
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
  """Compiles the program on all hosts before the first of them runs it.

  Gloo, on CPUs, gives a host half a minute for its first collective.
  """
  compiled = program.lower(list(specs)).compile()
  distributed.barrier("checksums compiled")
  return compiled


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _whole(leaves: Sequence[Any]) -> Sharding | None:
  """Returns a sharding by which every host has the result."""
  for leaf in leaves:
    if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding):
      return NamedSharding(sharding.mesh, PartitionSpec())
  return None
