"""What the C library keeps of memory that is no longer used."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

# Of `malloc.h`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The most to which glibc raises its own limits, by what is freed.
_LARGEST_LIMIT = 32 << 20
_SETTINGS = (
  "GLIBC_TUNABLES",
  "MALLOC_MMAP_THRESHOLD_",
  "MALLOC_TRIM_THRESHOLD_",
)


def return_free_memory() -> None:
  """Gives the system what is free, where C's library can.

  It else keeps some of what copies of a state took: a process of 0.5 GB with a
  state of 0.2 GB then takes up to 1.2 GB.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
  """Has new blocks from 1 MB on go back to the system once they are freed.

  Threads that read arrays in parallel else leave in every arena of glibc what
  they read: up to the size of the arrays once more. It holds for the whole
  process, in which glibc's limits stay where they are afterwards. Who has set
  them in the environment is left alone.
  """
  set_option = getattr(ctypes.CDLL(None), "mallopt", None)
  if set_option is None or any(name in os.environ for name in _SETTINGS):
    yield
    return
  set_option(_MMAP_THRESHOLD, 1 << 20)
  try:
    yield
  finally:
    set_option(_MMAP_THRESHOLD, _LARGEST_LIMIT)
    set_option(_TRIM_THRESHOLD, 2 * _LARGEST_LIMIT)
