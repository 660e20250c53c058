"""A folder that is written to through its descriptor, not its name."""

import os
import pathlib

from narvl_jax.files.disk_errors import errors_of
from narvl_jax.files.stores import is_remote


class FolderLostError(Exception):
  """The folder was renamed or removed while it was written to."""


class HeldStore:
  """A folder in a store, which cannot be renamed; see `HeldFolder`.

  Attributes:
    path: where to write.
    in_place: True.
  """

  in_place = True

  def __init__(self, folder: pathlib.Path) -> None:
    self.path = folder

  def check_in_place(self) -> None:
    """Does nothing."""

  def name_files(self, error: BaseException) -> None:
    """Does nothing: errors name the folder itself."""

  def cut_off(self) -> None:
    """Does nothing: without its last object, no checkpoint counts."""

  def close(self) -> None:
    """Does nothing."""


class HeldFolder:
  """An open folder that may be renamed or removed while it is written to.

  Libraries create the folders above a file that they write, so after a rename
  they would create a second folder of the old name. `/proc/self/fd/N` (Linux)
  follows the renamed folder, and nothing can be created in a removed one.

  Attributes:
    path: where to write; without /proc the path of the folder.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    """Opens a folder; creates it if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    self._folder = folder
    self._number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    through = pathlib.Path(f"/proc/self/fd/{self._number}")
    self.path = through if through.is_dir() else folder

  @property
  def in_place(self) -> bool:
    """Whether the folder still has its name."""
    try:
      return os.path.samestat(os.stat(self._folder), os.fstat(self._number))
    except OSError:
      return False

  def check_in_place(self) -> None:
    """Raises FolderLostError unless the folder still has its name."""
    if not self.in_place:
      raise FolderLostError

  def name_files(self, error: BaseException) -> None:
    """Replaces `path` in an error and its causes by the folder's own path."""
    for link in errors_of(error):
      if isinstance(link, OSError) and isinstance(link.filename, str):
        link.filename = self._named(link.filename)
      else:
        link.args = tuple(
          self._named(x) if isinstance(x, str) else x for x in link.args
        )

  def _named(self, text: str) -> str:
    return text.replace(f"{self.path}/", f"{self._folder}/")

  def cut_off(self) -> None:
    """Makes every later write through `path` fail; `in_place` becomes False.

    Threads of a library that cannot be stopped would create removed files
    again.
    """
    if self._number >= 0 and self.path != self._folder:
      # Not closed: the next opened file would get the descriptor.
      nothing = os.open(os.devnull, os.O_RDONLY)
      os.dup2(nothing, self._number)
      os.close(nothing)

  def close(self) -> None:
    """Closes the folder."""
    number, self._number = self._number, -1
    if number >= 0:
      os.close(number)


def hold(folder: pathlib.Path) -> HeldFolder | HeldStore:
  """Opens the folder that checkpoints are written to."""
  return HeldStore(folder) if is_remote(folder) else HeldFolder(folder)
