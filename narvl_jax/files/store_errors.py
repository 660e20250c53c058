"""Errors of stores as `OSError`, in one line with advice."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

from narvl_jax.files.schemes import StoreError

# Packages whose errors are errors of a store.
_PACKAGES = ("gcsfs", "google", "aiohttp", "s3fs", "botocore", "aiobotocore")
_PACKAGES += ("requests", "urllib3", "ssl", "asyncio", "concurrent")
_LOG_IN = {
  "gs": "gcloud auth application-default login, or set"
  " GOOGLE_APPLICATION_CREDENTIALS",
  "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}


@contextlib.contextmanager
def explained(path: Any) -> Iterator[None]:
  """Raises errors of libraries as `OSError` with a path and one line."""
  try:
    yield
  except FileExistsError:
    raise
  except FileNotFoundError as error:
    raise missing(path) from error
  except Exception as error:
    if isinstance(error, OSError) and error.filename == str(path):
      raise
    package = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError) and package not in _PACKAGES:
      raise
    raise StoreError(_reason(path, error), str(path)) from error


def _reason(path: Any, error: BaseException) -> str:
  """Returns an error of a store in one line, with advice."""
  text = " ".join(str(error).split())[:300] or type(error).__name__
  code = str(getattr(error, "code", None) or "")
  kind = type(error).__name__
  if code == "401" or "Credential" in kind or "Credentials" in text:
    login = _LOG_IN[path.scheme]
    return f"no valid credentials for {path.scheme}:// ({text}); {login}"
  if isinstance(error, PermissionError) or text.startswith("Forbidden"):
    return f"no permission ({text})"
  return f"the store failed ({text}); run the same command again later"


def missing(path: Any) -> FileNotFoundError:
  """Returns the error of a `StorePath` that does not exist."""
  return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
