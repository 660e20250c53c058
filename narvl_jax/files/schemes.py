"""The object stores, and the error of one that fails."""

import errno

# Scheme -> the package that reads it, which is also the name of the extra.
PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Without it, a folder that Orbax has written into a store is no checkpoint.
COMMIT_FILE = "commit_success.txt"


class StoreError(OSError):
  """A store failed; `strerror` is one line with advice."""

  def __init__(self, reason: str, path: str) -> None:
    super().__init__(errno.EREMOTEIO, reason, path)
