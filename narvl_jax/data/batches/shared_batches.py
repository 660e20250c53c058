"""Batches in shared memory that worker processes reuse.

Every worker has a few segments. It writes a batch into a free one and sends
only the name of the segment. The main process copies the arrays out and frees
the segment. A message is small enough to be written to a pipe at once, so a
worker that is killed never leaves half of one. When no segment is free the
batch travels through grain's own shared memory.

Reuse saves time: the kernel has to make every page of fresh shared memory.
Grain's `SharedMemoryArray`, which is new for each batch, costs 1.2 times the
CPU time per example (640 x 480 JPEG to 480 x 480, batch 32, one worker, grain
0.2.18, x86-64 Linux, 2 cores, 2026-11-30), also if workers decode into it.
"""

import dataclasses
import math
import shutil
import threading
from collections.abc import Mapping
from multiprocessing import shared_memory

import numpy as np

from narvl_jax.errors import UserError

# Key -> dtype and shape of each array of a batch.
Layout = Mapping[str, tuple[str, tuple[int, ...]]]

_FREE, _TAKEN = 0, 1
_CACHE_LINE = 64
# The first byte of the header is the state of the segment.
_HEADER = _CACHE_LINE
_FOLDER = "/dev/shm"


@dataclasses.dataclass(frozen=True)
class SharedBatch:
  """Sent by a worker in place of a batch: the name of its segment."""

  segment: str


class Segments:
  """The main process's side: creates segments and copies batches out of them.

  Attributes:
    names: names of the segments, a list for each worker.
  """

  def __init__(self, num_workers: int, count: int, layout: Layout) -> None:
    """Creates `count` segments for each worker, for batches of `layout`.

    The system provides their memory on first use.

    Raises:
      UserError: there is too little shared memory.
    """
    size = _HEADER + sum(_padded_size(*field) for field in layout.values())
    _check_space(num_workers * count * size)
    self.layout = layout
    self._segments = {
      segment.name: segment
      for segment in (
        shared_memory.SharedMemory(create=True, size=size)
        for _ in range(num_workers * count)
      )
    }
    names = list(self._segments)
    self.names = [names[i::num_workers] for i in range(num_workers)]

  def fetch(self, batch: SharedBatch) -> dict[str, np.ndarray]:
    """Returns copies of the arrays and frees their segment."""
    buffer = _buffer(self._segments[batch.segment])
    arrays = _arrays(buffer, self.layout)
    copies = {key: array.copy() for key, array in arrays.items()}
    buffer[0] = _FREE
    return copies

  def close(self) -> None:
    """Returns the memory to the system; may be called twice."""
    for segment in self._segments.values():
      segment.close()
      segment.unlink()
    self._segments.clear()


class WorkerSegments:
  """A worker's side: takes free segments and fills them."""

  def __init__(self, names: list[str], layout: Layout) -> None:
    self._segments = {x: shared_memory.SharedMemory(x) for x in names}
    self._layout = layout
    self._lock = threading.Lock()

  def take(self) -> tuple[SharedBatch, dict[str, np.ndarray]] | None:
    """Returns a free segment and its arrays; None if no segment is free.

    The arrays contain the values of an earlier batch.
    """
    with self._lock:
      # In order, so that the last segments may never use any memory.
      for name, segment in self._segments.items():
        buffer = _buffer(segment)
        if buffer[0] == _FREE:
          buffer[0] = _TAKEN
          return SharedBatch(name), _arrays(buffer, self._layout)
    return None

  def free(self, batch: SharedBatch) -> None:
    """Frees a segment that will not be sent."""
    _buffer(self._segments[batch.segment])[0] = _FREE


def _buffer(segment: shared_memory.SharedMemory) -> memoryview:
  assert segment.buf is not None  # Only when closed.
  return segment.buf


def _arrays(buffer: memoryview, layout: Layout) -> dict[str, np.ndarray]:
  """Returns views of a segment as the arrays of a batch."""
  arrays, offset = {}, _HEADER
  for key, (dtype, shape) in layout.items():
    arrays[key] = np.ndarray(shape, dtype, buffer, offset)
    offset += _padded_size(dtype, shape)
  return arrays


def _padded_size(dtype: str, shape: tuple[int, ...]) -> int:
  """Returns the bytes of an array, rounded up to whole cache lines."""
  size = np.dtype(dtype).itemsize * math.prod(shape)
  return -(-size // _CACHE_LINE) * _CACHE_LINE


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
