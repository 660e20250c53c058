"""Pictures of a batch in memory that worker processes and main process share.

Fresh shared memory costs more than copying into it: every page of it has to be
made by the kernel. So each worker has some segments of its own and uses them
again and again. It fills one that is free and sends its name; the main process
copies the pictures out and marks it as free. When none is free the pictures
travel as any other array does.
"""

import dataclasses
import math
import shutil
import threading
from collections.abc import Sequence
from multiprocessing import shared_memory

import numpy as np

from narvl_jax.errors import UserError

_FREE, _TAKEN = 0, 1
# The first byte is the state; pictures start at a cache line of their own.
_HEADER = 64
_FOLDER = "/dev/shm"


@dataclasses.dataclass(frozen=True)
class SharedImages:
  """Pictures in a segment: what a worker sends.

  Attributes:
    name: of the segment.
    shape: of the uint8 array.
  """

  name: str
  shape: tuple[int, ...]


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
      num_bytes: bytes of the pictures of a batch.

    Raises:
      UserError: there is not enough shared memory.
    """
    _check_space(num_workers * count * (num_bytes + _HEADER))
    self._segments: dict[str, shared_memory.SharedMemory] = {}
    self.names: list[list[str]] = []
    for _ in range(num_workers):
      own = [
        shared_memory.SharedMemory(create=True, size=num_bytes + _HEADER)
        for _ in range(count)
      ]
      self._segments.update((segment.name, segment) for segment in own)
      self.names.append([segment.name for segment in own])

  def fetch(self, images: SharedImages) -> np.ndarray:
    """Returns a copy of pictures and frees their segment."""
    segment = self._segments[images.name]
    found = _array(segment, images.shape).copy()
    _buffer(segment)[0] = _FREE
    return found

  def close(self) -> None:
    """Gives the memory back; may be called twice."""
    for segment in self._segments.values():
      segment.close()
      segment.unlink()
    self._segments.clear()


class WorkerSegments:
  """A worker's side: takes segments that are free and fills them."""

  def __init__(self, names: Sequence[str]) -> None:
    """Opens the segments of this worker."""
    self._segments = [shared_memory.SharedMemory(name) for name in names]
    self._lock = threading.Lock()

  def take(
    self, shape: tuple[int, ...]
  ) -> tuple[SharedImages, np.ndarray] | None:
    """Returns a free segment as uint8 of a shape, and what to send of it.

    None if none is free, or they are too small.
    """
    with self._lock:
      # The first that is free: those at the end may never take any memory.
      for segment in self._segments:
        small = segment.size - _HEADER < math.prod(shape)
        if small or _buffer(segment)[0] != _FREE:
          continue
        _buffer(segment)[0] = _TAKEN
        return SharedImages(segment.name, shape), _array(segment, shape)
    return None

  def free(self, images: SharedImages) -> None:
    """Frees a segment that will not be sent."""
    for segment in self._segments:
      if segment.name == images.name:
        _buffer(segment)[0] = _FREE


def _buffer(segment: shared_memory.SharedMemory) -> memoryview:
  assert segment.buf is not None  # Only when closed.
  return segment.buf


def _array(
  segment: shared_memory.SharedMemory, shape: tuple[int, ...]
) -> np.ndarray:
  return np.ndarray(shape, np.uint8, _buffer(segment), _HEADER)


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
