"""The number of records of each TFDS example: counted once, then cached."""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.files.stores import cache_folder, with_home

_CHUNK = 256


def record_ends(
  key: str, count: int, index_dir: str, records_of: Callable[[int], int]
) -> np.ndarray:
  """Returns the number of records up to the end of each example, int64 [count].

  Args:
    key: identifies the data set, its files and the sequence that is counted.
    index_dir: folder of the cache; "" is `$XDG_CACHE_HOME/narvl_jax`.
    records_of: example number -> its number of records.
  """
  folder = with_home(index_dir) if index_dir else cache_folder()
  name = hashlib.sha256(key.encode()).hexdigest()[:32]
  path = folder / f"tfds-{name}.npy"
  ends = _load(path, count)
  if ends is None:
    ends = np.cumsum(_count(count, records_of), dtype=np.int64)
    # Without a cache the next start counts again.
    with contextlib.suppress(OSError):
      _save(path, ends)
  return ends


def _count(count: int, records_of: Callable[[int], int]) -> np.ndarray:
  counts = np.zeros(count, np.int64)

  def fill(start: int) -> None:
    for index in range(start, min(start + _CHUNK, count)):
      counts[index] = records_of(index)

  # Reading releases the GIL; parsing does not.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    list(pool.map(fill, range(0, count, _CHUNK)))
  return counts


def _checksum(ends: np.ndarray) -> int:
  return zlib.crc32(np.ascontiguousarray(ends).tobytes())


def _load(path: pathlib.Path, count: int) -> np.ndarray | None:
  """Returns the content of a cache file, None if it is absent or damaged."""
  if not path.is_file():
    return None
  try:
    with open(path, "rb") as file:
      stored: Any = np.load(file, allow_pickle=False)
  # A damaged file raises errors of many types.
  except Exception:
    return None
  if not isinstance(stored, np.ndarray):
    return None
  if stored.dtype != np.int64 or stored.shape != (count + 1,):
    return None
  ends = stored[:-1]
  return ends if _checksum(ends) == int(stored[-1]) else None


def _save(path: pathlib.Path, ends: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  side_files.make_way(path)
  with atomically(path) as temporary, open(temporary, "wb") as file:
    np.save(file, np.append(ends, np.int64(_checksum(ends))))
