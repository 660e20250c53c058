"""Reads one version of an object in S3, which s3fs cannot do by itself."""

import errno
import os
from typing import Any

import fsspec.asyn


def read_range(path: Any, start: int, stop: int, etag: str) -> bytes:
  """Returns the bytes [start, stop) of a `StorePath`.

  Raises:
    FileNotFoundError: the object has another ETag, or does not exist.
    Exception: the store fails; errors of s3fs and its packages.
  """
  from s3fs.core import _error_wrapper

  bucket, name = path.key
  system = path.system

  async def read() -> Any:
    response = await system._call_s3(
      "get_object",
      Bucket=bucket,
      Key=name,
      IfMatch=etag,
      Range=f"bytes={start}-{stop - 1}",
    )
    async with response["Body"] as body:
      return await body.read()

  try:
    # Repeats a request whose answer was cut off.
    found: Any = fsspec.asyn.sync(
      system.loop, _error_wrapper, read, retries=system.retries
    )
    return found
  except OSError as error:
    response = getattr(error.__cause__, "response", None) or {}
    if response.get("Error", {}).get("Code") not in (
      "PreconditionFailed",
      "412",
    ):
      raise
    reason = os.strerror(errno.ENOENT)
    raise FileNotFoundError(errno.ENOENT, reason, str(path)) from error
