"""Keeps the compiled programs of commands on disk, for the next start.

jax computes the key of a program from its operations, the versions of jaxlib
and of the accelerator's driver, the compiler's options, the kind and number of
devices and, for CPUs, their instructions. A folder may therefore be shared by
different machines.
"""

import contextlib
import os
import pathlib
import warnings

from narvl_jax.errors import UserError
from narvl_jax.files.paths import check_folder
from narvl_jax.terminal.text import warn

FLAG = "--compilation_cache"
OFF = "off"
# A run of `configs/shapes.py` writes 2 MB.
_MAX_BYTES = 4 * 2**30
# Small programs are many, and together take as long as a large one.
_THRESHOLDS: dict[str, float] = {
  "jax_persistent_cache_min_compile_time_secs": 0.0,
  "jax_persistent_cache_min_entry_size_bytes": -1,
}


def default_folder() -> pathlib.Path:
  """Returns the folder of the user: `$XDG_CACHE_HOME/narvl_jax/compiled`."""
  home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(home).expanduser() / "narvl_jax" / "compiled"


def enable(chosen: str | None) -> None:
  """Turns the cache of this process on, or off.

  A folder that cannot be written is one warning.

  Args:
    chosen: a folder, such as one in a bucket, or "off". None is the folder in
      `JAX_COMPILATION_CACHE_DIR`, otherwise `default_folder()`.
  """
  # Imported here, so that --help is fast.
  import jax

  if chosen == OFF:
    jax.config.update("jax_enable_compilation_cache", False)
    return
  for name, value in _THRESHOLDS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
  # Another process may be writing an entry, or the disk be full. The program
  # is then compiled as without a cache.
  warnings.filterwarnings(
    "ignore", "Error (reading|writing) persistent compilation cache entry"
  )
  given: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore
  folder = chosen or given or ""
  if "://" in folder:
    # Only jax itself can write to buckets, not the compiler for GPUs.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
  elif chosen or not given:
    try:
      folder = os.path.abspath(chosen or default_folder())
      check_folder(FLAG, folder)
      # Whoever can write here can run code in the user's name.
      os.makedirs(folder, mode=0o700, exist_ok=True)
    except (OSError, RuntimeError, UserError) as error:
      warn(f"compiled programs are not kept: {error}, or {FLAG}={OFF}")
      return
    remove_oldest(folder, _MAX_BYTES)
  jax.config.update("jax_compilation_cache_dir", folder)


def remove_oldest(folder: str | os.PathLike[str], most: int) -> None:
  """Removes the least recently used entries beyond a number of bytes.

  The limit of jax (`jax_compilation_cache_max_size`) takes a lock and reads a
  file for every entry whenever it stores a program. After a kill between its
  two writes it stores nothing more.
  """
  found = []
  for path in pathlib.Path(folder).glob("*-cache"):
    with contextlib.suppress(OSError):
      stat = path.stat()
      # Reading may not change the access time, but writing sets both.
      found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  total = sum(size for _, size, _ in found)
  for _, size, path in sorted(found):
    if total <= most:
      break
    # Another process may have removed it.
    with contextlib.suppress(OSError):
      path.unlink()
    total -= size
