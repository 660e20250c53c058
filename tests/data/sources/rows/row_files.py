"""Helpers of the tests of rows."""

import os
import pathlib

from narvl_jax.data.sources.rows import index as row_index


def index_of(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(path.name + row_index.SUFFIX)


def rewrite(path: pathlib.Path, data: bytes) -> None:
  """Changes the content and keeps the times, as `cp -p` over a file does."""
  status = os.stat(path)
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
