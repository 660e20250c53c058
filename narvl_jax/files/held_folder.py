"""A folder that is written to where it is, even if its name changes."""

import os
import pathlib


class HeldFolder:
  """An open folder.

  Libraries make the folders above a file that they write. Where a folder is
  renamed or removed meanwhile, they would make a new one of its old name, with
  a part of what belongs into the other. A path that leads through the open
  folder (Linux) follows it wherever it goes, and nothing can be made in it
  once it is removed.

  Attributes:
    path: where to write; on systems without /proc the folder's own path.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    """Opens a folder.

    Args:
      folder: its path; made if need be.
    """
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

  def name_files(self, error: BaseException) -> None:
    """Gives files in errors the names that the user knows.

    Args:
      error: changed, as are those that it was raised from.
    """
    seen = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
      seen.add(id(link))
      if isinstance(link, OSError) and isinstance(link.filename, str):
        link.filename = self.name_in(link.filename)
      else:
        link.args = tuple(
          self.name_in(x) if isinstance(x, str) else x for x in link.args
        )
      link = link.__cause__ or link.__context__

  def name_in(self, text: str) -> str:
    """Returns a text with the folder's own path in the place of `path`."""
    return text.replace(f"{self.path}/", f"{self._folder}/")

  def cut_off(self) -> None:
    """Lets everything that is written through `path` fail from now on.

    Threads of a library that cannot be stopped would make again what is
    removed. `in_place` is False afterwards.
    """
    if self._number >= 0 and self.path != self._folder:
      # Not closed: the next file that is opened would get the number.
      nothing = os.open(os.devnull, os.O_RDONLY)
      os.dup2(nothing, self._number)
      os.close(nothing)

  def close(self) -> None:
    """Closes the folder, in which nothing may be written any more."""
    number, self._number = self._number, -1
    if number >= 0:
      os.close(number)
