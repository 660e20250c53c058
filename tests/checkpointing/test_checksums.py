"""Checksums depend on every bit, and not on the sharding."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax.checkpointing import checksums
from narvl_jax.parallel import make_mesh

_DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool")


def _array(dtype: str, *shape: int) -> np.ndarray:
  rng = np.random.default_rng(_DTYPES.index(dtype))
  bits = rng.integers(0, 256, (*shape, 8), dtype=np.uint8)
  if dtype == "bool":
    return bits[..., 0] > 100
  size = jnp.dtype(dtype).itemsize
  values = np.ascontiguousarray(bits[..., :size])
  return values.view(jnp.dtype(dtype))[..., 0]


def _flipped(array: np.ndarray, bit: int) -> np.ndarray:
  values = array.copy()
  data = values.reshape(-1).view(np.uint8)
  data[bit // 8] ^= 1 << (bit % 8)
  return values


def test_devices_and_host_agree():
  arrays = [_array(dtype, 3, 4, 5) for dtype in _DTYPES]
  arrays += [
    np.float32(2.5),
    np.int32(-7),
    np.zeros((0, 3), np.float32),
    np.zeros((4, 3), np.float32),
    # NaNs with a payload, which arithmetic does not preserve.
    np.array([0x7F800001, 0xFFC12345], np.uint32).view(np.float32),
  ]
  found = checksums.device_checksums(arrays)
  expected = [checksums.host_checksum(np.asarray(x)) for x in arrays]
  np.testing.assert_array_equal(found, expected)
  # Zero is the checksum of an empty array, not of zeros.
  assert [x.tolist() == [0, 0] for x in found[-3:]] == [True, False, False]
  assert len({checksums.text(x) for x in found}) == len(arrays)


def test_no_arrays():
  assert checksums.device_checksums([]).shape == (0, 2)


def test_random_keys_are_their_data():
  key = jax.random.split(jax.random.key(3))[0]
  found = checksums.device_checksums([key, jax.random.key(4)])
  data = np.asarray(jax.random.key_data(key))
  np.testing.assert_array_equal(found[0], checksums.host_checksum(data))
  assert found[0].tolist() != found[1].tolist()


def test_a_checksum_is_the_sum_that_is_documented():
  words = np.array([3, 2**32 - 1, 17], np.uint32)
  first = second = 0
  for place, word in enumerate(map(int, words)):
    first = (first + word * (2 * place + 1)) % 2**32
    mixed = word ^ (place * 0x9E3779B1 % 2**32)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B % 2**32
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 % 2**32
    second = (second + (mixed ^ (mixed >> 16))) % 2**32
  assert checksums.host_checksum(words).tolist() == [first, second]
  assert checksums.text(np.array([first, second])) == f"{first:08x}{second:08x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_every_bit_counts_in_each_sum(dtype):
  array = _array(dtype, 5, 7)
  whole = checksums.host_checksum(array)
  for bit in range(8 * array.nbytes):
    changed = checksums.host_checksum(_flipped(array, bit))
    assert (changed != whole).all(), bit


def test_every_bit_counts_on_devices():
  array = _array("float32", 3, 5)
  bits = range(0, 8 * array.nbytes, 3)
  found = checksums.device_checksums([_flipped(array, bit) for bit in bits])
  whole = checksums.host_checksum(array)
  assert (found != whole).all()
  assert len({checksums.text(x) for x in found}) == len(bits)


def test_two_other_signs_are_seen():
  array = _array("float32", 40)
  whole = checksums.host_checksum(array)
  for i, j in itertools.combinations(range(40), 2):
    changed = array.copy()
    changed[[i, j]] *= -1
    assert checksums.host_checksum(changed).tolist() != whole.tolist()


def test_words_in_each_others_place_are_seen():
  array = np.arange(40, dtype=np.float32)
  whole = checksums.text(checksums.host_checksum(array))
  for i, j in itertools.combinations(range(40), 2):
    swapped = array.copy()
    swapped[[i, j]] = array[[j, i]]
    assert checksums.text(checksums.host_checksum(swapped)) != whole


def test_large_arrays_are_summed_in_blocks(monkeypatch):
  array = _array("float32", 11, 13)
  whole = checksums.host_checksum(array)
  monkeypatch.setattr(checksums, "_BLOCK", 16)
  np.testing.assert_array_equal(checksums.host_checksum(array), whole)


def test_every_mesh_gives_the_same_and_moves_little():
  arrays = [_array("float32", 16, 32, 8), _array("bfloat16", 24, 8)]
  expected = [checksums.host_checksum(x) for x in arrays]
  mesh = make_mesh(2, 2, 2)
  for spec in (
    PartitionSpec(),
    PartitionSpec("fsdp"),
    PartitionSpec(("data", "fsdp"), "tensor"),
    PartitionSpec(None, ("data", "fsdp", "tensor")),
  ):
    placed = jax.device_put(arrays, NamedSharding(mesh, spec))
    found = checksums.device_checksums(placed)
    np.testing.assert_array_equal(found, expected, err_msg=str(spec))
  program = checksums._program(checksums._whole(placed))
  compiled = program.lower(placed).compile().as_text()
  gathered = re.findall(r"= u32\[([\d,]*)\]\S* all-(?:gather|reduce)", compiled)
  assert gathered
  sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in gathered]
  assert max(sizes) <= 8


def test_hosts_wait_for_each_other_between_compiling_and_running(monkeypatch):
  events = []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(checksums.distributed, "barrier", events.append)
  program = checksums._program

  def watched(where):
    class Watched:
      def lower(self, leaves):
        return self

      def compile(self):
        events.append("compile")
        return lambda leaves: events.append("run") or program(where)(leaves)

    return Watched()

  monkeypatch.setattr(checksums, "_program", functools.cache(watched))
  leaves = [jnp.arange(5.0)]
  expected = checksums.host_checksum(np.arange(5, dtype=np.float32))
  for _ in range(2):
    (found,) = checksums.device_checksums(leaves)
    np.testing.assert_array_equal(found, expected)
  assert events == ["compile", "checksums compiled", "run", "run"]
