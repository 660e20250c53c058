"""Files that grow: written in place, or locally and copied to a store."""

import contextlib
import pathlib
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable

from narvl_jax.files import leftovers
from narvl_jax.files.stores import is_remote
from narvl_jax.terminal.text import warn

# Between two copies of files that have changed.
_SECONDS = 30.0
_open: "weakref.WeakSet[Spool]" = weakref.WeakSet()


class Spool:
  """A folder whose files are appended to.

  Objects of a store cannot be appended to. The files of a folder in a store are
  therefore written in a temporary folder, from which a thread copies those that
  have changed.

  Attributes:
    folder: where to write; the folder itself if it is local.
  """

  def __init__(self, folder: pathlib.Path, names: Iterable[str] = ()) -> None:
    """Opens the folder.

    Args:
      names: files to continue, which are copied from the store first.

    Raises:
      OSError: the store fails.
    """
    self.folder = folder
    self._target: pathlib.Path | None = None
    if not is_remote(folder):
      return
    self._target = folder
    self._copied: dict[str, tuple[int, int]] = {}
    self._lock = threading.Lock()
    self._closed = threading.Event()
    place = pathlib.Path(tempfile.gettempdir()) / "narvl_jax"
    leftovers.remove_beside(place)
    self.folder = leftovers.temporary_path(place)
    self.folder.mkdir()
    for name in names:
      if (folder / name).is_file():
        (self.folder / name).write_bytes((folder / name).read_bytes())
        self._copied[name] = _state(self.folder / name)
    _open.add(self)
    threading.Thread(target=self._copy_often, daemon=True).start()

  def sync(self) -> None:
    """Copies what has changed.

    Raises:
      OSError: the store fails.
    """
    if self._target is None:
      return
    with self._lock:
      for path in sorted(self.folder.rglob("*")):
        name = path.relative_to(self.folder).as_posix()
        # Names with a dot are temporary.
        if path.name.startswith(".") or not path.is_file():
          continue
        state = _state(path)
        if self._copied.get(name) != state:
          (self._target / name).write_bytes(path.read_bytes())
          self._copied[name] = state

  def close(self) -> None:
    """Copies what has changed and removes the temporary folder.

    Raises:
      OSError: the store fails; the temporary folder is kept.
    """
    if self._target is not None and not self._closed.is_set():
      self._closed.set()
      self.sync()
      shutil.rmtree(self.folder, ignore_errors=True)

  def _copy_often(self) -> None:
    failed = False
    while not self._closed.wait(_SECONDS):
      try:
        self.sync()
        failed = False
      except OSError as error:
        if not failed and not self._closed.is_set():
          warn(f"{error.filename} is not up to date: {error.strerror}")
        failed = True


def sync_all(seconds: float) -> None:
  """Copies the files of all open folders before the process ends.

  Args:
    seconds: after which a store that does not answer is given up.
  """
  deadline = time.monotonic() + seconds

  def close(spool: Spool) -> None:
    with contextlib.suppress(OSError):
      spool.close()

  threads = [
    threading.Thread(target=close, args=(x,), daemon=True) for x in _open
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(max(deadline - time.monotonic(), 0.0))


def _state(path: pathlib.Path) -> tuple[int, int]:
  found = path.stat()
  return found.st_size, found.st_mtime_ns
