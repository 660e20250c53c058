"""Digests of the files of a checkpoint: `STEP/digests.HOST-of-HOSTS.txt`.

Each host writes them for its own files right after the checkpoint was saved.
They cover every byte, need no knowledge of the formats, and are quick to check.
The first line is the digest of the rest.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from narvl_jax.checkpointing.record import (
  FILE,
  ITEM,
  CheckpointRecord,
  RenamedCheckpoint,
  digest,
  to_json,
)
from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically, files_below
from narvl_jax.files.regular import is_regular, open_regular, read_regular
from narvl_jax.files.stores import is_remote

# Damage of a path that must not be opened.
NOT_REGULAR = "is not a regular file"
_NAME = re.compile(r"digests\.(\d{1,9})-of-(\d{1,9})\.txt")
# As `record.digest`.
_HASH = functools.partial(hashlib.blake2b, digest_size=16)
# Folder in which Orbax stores the data of one process.
# Threads that read objects of a store, mostly waiting.
_STORE_THREADS = 16
_OF_PROCESS = re.compile(r"/ocdbt\.process_(\d+)/")


class Digests(NamedTuple):
  """Digests as stored on disk.

  Attributes:
    files: file -> [bytes, digest].
    step: step of the checkpoint they were written for; None if unknown.
    complete: whether every host has written its digests.
    problems: [file of digests, its damage].
  """

  files: dict[str, list[Any]]
  step: str | None
  complete: bool
  problems: list[list[str]]


def write_digests(folder: pathlib.Path, host: int = 0, hosts: int = 1) -> None:
  """Writes the digests of the files that this host wrote.

  Args:
    folder: folder of the checkpoint, named after the step.
    hosts: number of hosts; all must call this.
  """
  names = [name for name in _files(folder) if _owner(name, hosts) == host]
  # A store is read in parallel; a disk is left to the training run.
  threads = _STORE_THREADS if is_remote(folder) else 1
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    entries = pool.map(lambda name: _entry(folder / name), names)
    found = dict(zip(names, entries, strict=True))
  path = folder / f"digests.{host}-of-{hosts}.txt"
  _write(path, {"step": folder.name, "files": found})


def _entry(path: pathlib.Path) -> list[Any]:
  return [path.stat().st_size, _digest_file(path)]


def replace_record(folder: pathlib.Path, record: CheckpointRecord) -> None:
  """Replaces the record of an intact checkpoint, and its digest.

  A process that is killed in between leaves a checkpoint with incomplete
  digests, so its arrays are compared instead.
  """
  name = f"{ITEM}/{FILE}"
  data = json.dumps(to_json(record)).encode()
  bodies = {
    path: json.loads(read_regular(path).partition(b"\n")[2])
    for path in folder.glob("digests.*.txt")
  }
  listing = next((x for x, y in bodies.items() if name in y["files"]), None)
  if listing is not None:
    listing.unlink()
  with atomically(folder / name) as temporary:
    temporary.write_bytes(data)
  if listing is not None:
    bodies[listing]["files"][name] = [len(data), digest(data)]
    _write(listing, bodies[listing])


def describe_digests(folder: pathlib.Path) -> str:
  """Returns whether all digests are present: "yes", "no" or "damaged"."""
  digests = read_digests(folder)
  if digests.problems:
    return "damaged"
  return "yes" if digests.complete else "no"


def has_digests(folder: pathlib.Path) -> bool:
  """Returns whether the digests of all hosts are present and intact."""
  return describe_digests(folder) == "yes"


def read_digests(folder: pathlib.Path) -> Digests:
  """Reads the digests of all hosts, even if incomplete or damaged."""
  files: dict[str, list[Any]] = {}
  step, problems, counts, parts = None, [], set(), set()
  for path in sorted(folder.glob("digests.*.txt")):
    match = _NAME.fullmatch(path.name)
    if match is None:
      problems.append([path.name, "is not a file of a checkpoint"])
      continue
    parts.add(int(match.group(1)))
    counts.add(int(match.group(2)))
    try:
      values = _parse(read_regular(path))
    except OSError as error:
      problems.append([path.name, f"cannot be read: {error.strerror}"])
      continue
    if values is None:
      problems.append([path.name, "was changed"])
      continue
    files |= values["files"]
    step = values["step"]
  complete = len(counts) == 1 and len(parts) == max(counts)
  return Digests(files, step, complete, problems)


def check_files(
  folder: pathlib.Path, digests: Digests, host: int, hosts: int
) -> list[list[str]]:
  """Compares the names of all files, and the contents of this host's share.

  Returns:
    [file, its damage].
  """
  problems = list(digests.problems)
  if digests.step not in (None, folder.name):
    problems.append([f"{folder.name}/", str(RenamedCheckpoint(digests.step))])
  names = set(_files(folder))
  # Reading a pipe or a device would not end.
  present = names
  if not is_remote(folder):
    present = {name for name in names if is_regular(folder / name)}
  problems += [[name, NOT_REGULAR] for name in sorted(names - present)]
  # Only complete digests show that a file is foreign.
  new = set()
  if digests.complete and not digests.problems:
    new = present - digests.files.keys()
  missing = digests.files.keys() - names
  by_digest = _digests_by_size(
    folder, sorted(new), {digests.files[name][0] for name in missing}
  )
  for name in sorted(missing):
    renamed = by_digest.get(digests.files[name][1])
    new.discard(renamed or "")
    how = f"was renamed to {renamed}" if renamed else "is missing"
    problems.append([name, how])
  problems += [
    [name, "is not a file of this checkpoint"] for name in sorted(new)
  ]

  own = sorted(digests.files.keys() & present)[host::hosts]
  # hashlib releases the GIL.
  threads = _STORE_THREADS if is_remote(folder) else os.cpu_count()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = pool.map(lambda x: _check_file(folder / x, *digests.files[x]), own)
    problems += [[x, what] for x, what in zip(own, found, strict=True) if what]
  return problems


def _check_file(path: pathlib.Path, size: int, digest: str) -> str:
  """Returns the damage of a file; "" if it is intact."""
  try:
    found = path.stat().st_size
    if found != size:
      return f"has {found} bytes, not {size}"
    return "was changed" if _digest_file(path) != digest else ""
  except FileNotFoundError:
    return "is missing"
  except OSError as error:
    return f"cannot be read: {error.strerror}"


def _write(path: pathlib.Path, values: dict[str, Any]) -> None:
  body = json.dumps(values, indent=0) + "\n"
  with atomically(path) as temporary:
    temporary.write_text(digest(body.encode()) + "\n" + body)


def _parse(data: bytes) -> dict[str, Any] | None:
  """Returns the step and the files of digests; None if they were changed."""
  first, _, body = data.partition(b"\n")
  if first.decode("latin-1") != digest(body):
    return None
  values = side_files.parse_object(body)
  if values is None or not isinstance(values.get("step"), str):
    return None
  files = values.get("files")
  valid = isinstance(files, dict) and all(
    isinstance(entry, list)
    and len(entry) == 2
    and type(entry[0]) is int
    and isinstance(entry[1], str)
    for entry in files.values()
  )
  return values if valid else None


def _digests_by_size(
  folder: pathlib.Path, names: Sequence[str], sizes: Collection[int]
) -> dict[str, str]:
  """Returns digest -> name of those files that have one of some sizes."""
  found = {}
  for name in names:
    with contextlib.suppress(OSError):
      if (folder / name).stat().st_size in sizes:
        found[_digest_file(folder / name)] = name
  return found


def _files(folder: pathlib.Path) -> list[str]:
  """Returns the files below a checkpoint's folder, without the digests."""
  # Names with a dot are temporary files of digests.
  names = files_below(folder)
  return [x for x in names if not x.startswith((".digests.", "digests."))]


def _owner(name: str, hosts: int) -> int:
  """Returns the host that wrote a file, 0 for shared files."""
  match = _OF_PROCESS.search(f"/{name}")
  number = int(match.group(1)) if match else 0
  return number if number < hosts else 0


def _digest_file(path: pathlib.Path) -> str:
  with open_regular(path) as file:
    return hashlib.file_digest(file, _HASH).hexdigest()
