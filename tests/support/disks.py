"""Small, full and read-only disks."""

import contextlib
import os
import pathlib
import resource
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small_disk(
  folder: pathlib.Path, kilobytes: int, files: int = 0
) -> Iterator[pathlib.Path]:
  """Mounts a small file system; skips the test if that is not permitted.

  Args:
    folder: mount point.
    kilobytes: size.
    files: maximum number of files; 0: unlimited.
  """
  folder.mkdir(parents=True, exist_ok=True)
  options = f"size={kilobytes}k" + (f",nr_inodes={files}" if files else "")
  mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs"]
  try:
    subprocess.run([*mount, folder], check=True, capture_output=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no disk can be mounted here: {error}")
  try:
    yield folder
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: pathlib.Path) -> None:
  """Fills the disk of a folder to the last byte."""
  with (folder / "filler").open("wb", buffering=0) as file:
    for size in (1 << 16, 1):
      with contextlib.suppress(OSError):
        while True:
          file.write(bytes(size))


def use_all_files(folder: pathlib.Path) -> None:
  """Uses up the inodes of a disk; bytes stay free."""
  with contextlib.suppress(OSError):
    for number in range(100_000):
      (folder / f"filler_{number}").touch()


def read_only(folder: pathlib.Path) -> None:
  """Remounts a disk of `small_disk` read-only; no file may be open."""
  subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


@contextlib.contextmanager
def short_files(size: int) -> Iterator[None]:
  """Limits the size of files that this process writes; needs no rights."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: pathlib.Path) -> set[str]:
  """Returns all files below a folder, including hidden ones."""
  return {
    os.path.relpath(os.path.join(place, name), folder)
    for place, _, names in os.walk(folder)
    for name in names
  }
