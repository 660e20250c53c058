"""Batches in memory that worker processes and main process share.

Fresh shared memory costs more than copying into it: every page of it has to be
made by the kernel. So each worker has some segments of its own and uses them
again and again. It fills one that is free and sends what lies where; the main
process copies the arrays out and marks the segment as free. Messages stay so
small that a worker that is killed leaves none half-written. When no segment is
free a batch travels in grain's way.
"""

import dataclasses
import shutil
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import shared_memory

import numpy as np

from narvl_jax.errors import UserError

_FREE, _TAKEN = 0, 1
_CACHE_LINE = 64
# The first byte is the state.
_HEADER = _CACHE_LINE
_FOLDER = "/dev/shm"


@dataclasses.dataclass(frozen=True)
class SharedBatch:
  """What a worker sends of a batch.

  Attributes:
    segment: name of the segment that holds it.
    arrays: (key, dtype, shape, offset in bytes) of each array.
  """

  segment: str
  arrays: tuple[tuple[str, str, tuple[int, ...], int], ...]


def segment_bytes(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the size of a segment for such arrays."""
  return _HEADER + sum(_padded(array.nbytes) for array in arrays.values())


class Segments:
  """The main process's side: makes the segments and empties them.

  Attributes:
    names: of the segments of each worker.
  """

  def __init__(self, num_workers: int, count: int, num_bytes: int) -> None:
    """Makes segments; memory is taken only where they are used.

    Args:
      num_workers: processes that fill them.
      count: segments of each.
      num_bytes: of each, see `segment_bytes`.

    Raises:
      UserError: there is not enough shared memory.
    """
    _check_space(num_workers * count * num_bytes)
    self._segments: dict[str, shared_memory.SharedMemory] = {}
    self.names: list[list[str]] = []
    for _ in range(num_workers):
      own = [
        shared_memory.SharedMemory(create=True, size=num_bytes)
        for _ in range(count)
      ]
      self._segments.update((segment.name, segment) for segment in own)
      self.names.append([segment.name for segment in own])

  def fetch(self, batch: SharedBatch) -> dict[str, np.ndarray]:
    """Returns copies of the arrays and frees their segment."""
    segment = self._segments[batch.segment]
    found = {
      key: np.ndarray(shape, dtype, _buffer(segment), offset).copy()
      for key, dtype, shape, offset in batch.arrays
    }
    _buffer(segment)[0] = _FREE
    return found

  def close(self) -> None:
    """Gives the memory back; may be called twice."""
    for segment in self._segments.values():
      segment.close()
      segment.unlink()
    self._segments.clear()


class Segment:
  """A worker's segment that was free and is now its own."""

  def __init__(self, memory: shared_memory.SharedMemory) -> None:
    """Takes it."""
    self._memory = memory
    _buffer(memory)[0] = _TAKEN

  def first(self, shape: Sequence[int]) -> np.ndarray:
    """Returns its first bytes as uint8 [*shape], to be written in place."""
    return np.ndarray(shape, np.uint8, _buffer(self._memory), _HEADER)

  def pack(self, first: str, arrays: Mapping[str, np.ndarray]) -> SharedBatch:
    """Copies arrays in, but for the one that lies there first already."""
    order = [first, *(key for key in arrays if key != first)]
    offset, placed = _HEADER, []
    for key in order:
      array = arrays[key]
      if key != first:
        view = np.ndarray(
          array.shape, array.dtype, _buffer(self._memory), offset
        )
        view[...] = array
      placed.append((key, array.dtype.str, array.shape, offset))
      offset += _padded(array.nbytes)
    return SharedBatch(self._memory.name, tuple(placed))

  def free(self) -> None:
    """Frees it, if it will not be sent."""
    _buffer(self._memory)[0] = _FREE


class WorkerSegments:
  """A worker's side: takes segments that are free and fills them."""

  def __init__(self, names: Sequence[str]) -> None:
    """Opens the segments of this worker."""
    self._segments = [shared_memory.SharedMemory(name) for name in names]
    self._lock = threading.Lock()

  def take(self, num_bytes: int) -> Segment | None:
    """Returns a free segment, None if there is none or they are too small."""
    with self._lock:
      # The first that is free: those at the end may never take any memory.
      for segment in self._segments:
        if segment.size >= num_bytes and _buffer(segment)[0] == _FREE:
          return Segment(segment)
    return None


def _buffer(segment: shared_memory.SharedMemory) -> memoryview:
  assert segment.buf is not None  # Only when closed.
  return segment.buf


def _padded(num_bytes: int) -> int:
  """Rounds up to whole cache lines."""
  return -(-num_bytes // _CACHE_LINE) * _CACHE_LINE


def _check_space(needed: int) -> None:
  try:
    free = shutil.disk_usage(_FOLDER).free
  except OSError:
    return  # Other systems keep shared memory elsewhere.
  if free < needed:
    raise UserError(
      f"data workers may need {needed / 1e6:.0f} MB of shared memory,"
      f" {_FOLDER} has {free / 1e6:.0f} MB free: enlarge it (docker run"
      " --shm-size), or lower --config.data.num_workers or"
      " --config.data.prefetch"
    )
