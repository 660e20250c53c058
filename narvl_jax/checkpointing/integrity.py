"""Whether a checkpoint on disk is what was written.

Two things tell. Checksums of the arrays (`checksums`), taken on the devices,
are in the record and so are there from the moment that there is a checkpoint.
A digest of every file is written right after, each host for the files that it
wrote: it covers also what is no array, needs no knowledge of the formats, and
is quick to check. A checkpoint of a run that was killed in between has no
digests; its arrays are read and compared instead.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from narvl_jax.checkpointing import checksums
from narvl_jax.checkpointing.record import (
  FILE,
  ITEM,
  ITEMS,
  BrokenRecord,
  CheckpointRecord,
  RenamedCheckpoint,
  item_of,
  read_leaf,
  read_record,
  to_json,
)
from narvl_jax.errors import UserError
from narvl_jax.files import side_files
from narvl_jax.files.disk import atomically
from narvl_jax.files.regular import is_regular, open_regular, read_regular

_DIGESTS = re.compile(r"digests\.(\d{1,9})-of-(\d{1,9})\.txt")
# Where Orbax keeps what one process wrote.
_OF_PROCESS = re.compile(r"/ocdbt\.process_(\d+)/")
# Files, and arrays, that a line names.
_SHOWN = 3
# What is said of something that must not be opened.
_NO_FILE = "is no regular file"

# Value of this host -> values of all.
Gather = Callable[[Any], Sequence[Any]]


class Damage(NamedTuple):
  """What is wrong with a checkpoint.

  Attributes:
    files: [file below its folder, what is wrong with it]; a name with "/" at
      its end is that of the folder itself.
    leaves: [array, what is wrong with it].
  """

  files: list[list[str]]
  leaves: list[list[str]]

  def by_kind(self) -> dict[str, list[list[str]]]:
    """Returns what is wrong with the folder, its files and its arrays."""
    folders = [[x[:-1], what] for x, what in self.files if x.endswith("/")]
    files = [x for x in self.files if not x[0].endswith("/")]
    return {"folder": folders, "file": files, "array": self.leaves}

  def __str__(self) -> str:
    return "; ".join(
      f"{kind} {_shorten(found)}"
      for kind, found in self.by_kind().items()
      if found
    )


class DamagedCheckpoint(UserError):
  """A checkpoint is not what was written.

  Attributes:
    step: its name.
    damage: what is wrong with it.
  """

  def __init__(self, step: int, damage: Damage, advice: str = "") -> None:
    """Makes the message.

    Args:
      step: name of the checkpoint.
      damage: what is wrong with it.
      advice: what to do.
    """
    text = f"the checkpoint of step {step} is damaged: {damage}"
    super().__init__(f"{text}; {advice}" if advice else text)
    self.step = step
    self.damage = damage


def write_digests(folder: pathlib.Path, host: int = 0, hosts: int = 1) -> None:
  """Writes the digests of the files that this host wrote.

  Args:
    folder: of the checkpoint, whose name is the step.
    host: which host this is.
    hosts: how many there are; all are to call it.
  """
  found = {
    name: [(folder / name).stat().st_size, _digest(folder / name)]
    for name in _files(folder)
    if _owner(name, hosts) == host
  }
  path = folder / f"digests.{host}-of-{hosts}.txt"
  _write_digests(path, {"step": folder.name, "files": found})


def _write_digests(path: pathlib.Path, values: dict[str, Any]) -> None:
  body = json.dumps(values, indent=0) + "\n"
  with atomically(path) as temporary:
    temporary.write_text(_digest_of(body.encode()) + "\n" + body)


def replace_record(folder: pathlib.Path, record: CheckpointRecord) -> None:
  """Replaces the record of an intact checkpoint, and its digest.

  A process that is killed in between leaves a checkpoint without all digests,
  whose arrays are compared instead.

  Args:
    folder: of the checkpoint.
    record: the new one, of the same arrays.
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
    bodies[listing]["files"][name] = [len(data), _digest_of(data)]
    _write_digests(listing, bodies[listing])


def has_digests(folder: pathlib.Path) -> bool:
  """Returns whether the digests of all hosts are there and intact."""
  return describe_digests(folder) == "yes"


def describe_digests(folder: pathlib.Path) -> str:
  """Returns whether there are digests: "yes", "no" or "damaged"."""
  digests = _read_digests(folder)
  if digests.problems:
    return "damaged"
  return "yes" if digests.complete else "no"


def examine(
  folder: pathlib.Path,
  host: int = 0,
  hosts: int = 1,
  gather: Gather = lambda value: [value],
) -> Damage | None:
  """Compares a checkpoint with what was written.

  Hosts share the work and come to the same result.

  Args:
    folder: of the checkpoint.
    host: which host this is.
    hosts: how many there are.
    gather: returns what it is given on each host, on all of them.

  Returns:
    What is wrong, None if nothing is.
  """
  digests = _read_digests(folder)
  problems = _check_files(folder, digests, host, hosts)
  record = None
  try:
    record = read_record(folder)
  except OSError:
    problems.append([f"{ITEM}/{FILE}", "is missing"])
  except RenamedCheckpoint as error:
    problems.append([f"{folder.name}/", str(error)])
  except BrokenRecord as error:
    problems.append([f"{ITEM}/{FILE}", str(error)])
  shared = gather([problems, digests.complete])
  files = _merge(found for found, _ in shared)
  if all(complete for _, complete in shared) and not files:
    return None
  # Which arrays a file holds parts of is not known, but its item is.
  suspects = set(ITEMS)
  if all(complete for _, complete in shared):
    suspects &= {name.split("/", 1)[0] for name, _ in files}
  # Reading the arrays of an item that holds a pipe would not end.
  suspects -= {
    name.split("/", 1)[0] for name, what in files if what == _NO_FILE
  }
  leaves = (
    []
    if record is None
    else _check_leaves(folder, record, suspects, host, hosts)
  )
  damage = Damage(files, _merge(gather(leaves)))
  return damage if damage.files or damage.leaves else None


def compare_leaves(
  record: CheckpointRecord, names: Sequence[str], found: Any
) -> list[list[str]]:
  """Returns the arrays whose checksums differ from those that were written.

  Args:
    record: of the checkpoint.
    names: of arrays.
    found: their checksums, uint32 [len(names), 2].
  """
  return [
    [name, "has other values than those that were saved"]
    for name, checksum in zip(names, found, strict=True)
    if checksums.text(checksum) != record.leaves[name].checksum
  ]


class _Digests(NamedTuple):
  """Digests as they are on disk.

  Attributes:
    files: file -> [bytes, digest].
    step: of the checkpoint they were written for; None if that is not known.
    complete: whether there is a file of digests of every host.
    problems: [file of digests, what is wrong with it].
  """

  files: dict[str, list[Any]]
  step: str | None
  complete: bool
  problems: list[list[str]]


def _read_digests(folder: pathlib.Path) -> _Digests:
  files: dict[str, list[Any]] = {}
  step, problems, counts, parts = None, [], set(), set()
  for path in sorted(folder.glob("digests.*.txt")):
    match = _DIGESTS.fullmatch(path.name)
    if match is None:
      problems.append([path.name, "is no file of a checkpoint"])
      continue
    parts.add(int(match.group(1)))
    counts.add(int(match.group(2)))
    try:
      values = _parse_digests(read_regular(path))
    except OSError as error:
      problems.append([path.name, f"cannot be read: {error.strerror}"])
      continue
    if values is None:
      problems.append([path.name, "was changed"])
      continue
    files |= values["files"]
    step = values["step"]
  complete = len(counts) == 1 and len(parts) == max(counts)
  return _Digests(files, step, complete, problems)


def _parse_digests(data: bytes) -> dict[str, Any] | None:
  """Returns the step and the files of digests, None if they were changed."""
  first, _, body = data.partition(b"\n")
  if first.decode("latin-1") != _digest_of(body):
    return None
  values = side_files.parse_object(body)
  if values is None or not isinstance(values.get("step"), str):
    return None
  files = values.get("files")
  right = isinstance(files, dict) and all(
    isinstance(entry, list)
    and len(entry) == 2
    and type(entry[0]) is int
    and isinstance(entry[1], str)
    for entry in files.values()
  )
  return values if right else None


def _check_files(
  folder: pathlib.Path, digests: _Digests, host: int, hosts: int
) -> list[list[str]]:
  """Compares the names of all files, and the contents of those of a host."""
  problems = list(digests.problems)
  if digests.step not in (None, folder.name):
    problems.append([f"{folder.name}/", str(RenamedCheckpoint(digests.step))])
  names = set(_files(folder))
  # Reading a pipe or a device would not end.
  present = {name for name in names if is_regular(folder / name)}
  problems += [[name, _NO_FILE] for name in sorted(names - present)]
  new = present - digests.files.keys()
  # While digests are missing it cannot be told what else is one too many.
  if not digests.complete or digests.problems:
    new = set()
  missing = digests.files.keys() - names
  by_digest = _digests_by_size(
    folder, sorted(new), {digests.files[name][0] for name in missing}
  )
  for name in sorted(missing):
    renamed = by_digest.get(digests.files[name][1])
    new.discard(renamed or "")
    how = f"was renamed to {renamed}" if renamed else "is missing"
    problems.append([name, how])
  problems += [[name, "is no file of this checkpoint"] for name in sorted(new)]

  def check(name: str) -> list[list[str]]:
    size, digest = digests.files[name]
    try:
      found = (folder / name).stat().st_size
      if found != size:
        return [[name, f"has {found} bytes, not {size}"]]
      changed = _digest(folder / name) != digest
    except FileNotFoundError:
      return [[name, "is missing"]]
    except OSError as error:
      return [[name, f"cannot be read: {error.strerror}"]]
    return [[name, "was changed"]] if changed else []

  own = sorted(digests.files.keys() & present)[host::hosts]
  # Digests are computed without the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for found in pool.map(check, own):
      problems += found
  return problems


def _digests_by_size(
  folder: pathlib.Path, names: Sequence[str], sizes: Collection[int]
) -> dict[str, str]:
  """Returns digest -> name of those files that have one of some sizes."""
  found = {}
  for name in names:
    with contextlib.suppress(OSError):
      if (folder / name).stat().st_size in sizes:
        found[_digest(folder / name)] = name
  return found


def _check_leaves(
  folder: pathlib.Path,
  record: CheckpointRecord,
  items: Collection[str],
  host: int,
  hosts: int,
) -> list[list[str]]:
  """Reads the arrays of some items, one after the other."""
  problems = []
  names = [x for x in record.leaves if item_of(x) in items]
  for name in sorted(names)[host::hosts]:
    try:
      value = read_leaf(folder, name)
    except ValueError:
      problems.append([name, "cannot be read"])
      continue
    found = checksums.host_checksum(value)
    problems += compare_leaves(record, [name], [found])
  return problems


def _merge(found: Iterable[list[list[str]]]) -> list[list[str]]:
  """Returns what all hosts found, once."""
  return [list(x) for x in sorted({tuple(x) for part in found for x in part})]


def _files(folder: pathlib.Path) -> list[str]:
  """Returns the files below a checkpoint's folder, without the digests."""
  names = []
  for place, _, files in os.walk(folder):
    below = pathlib.Path(place).relative_to(folder).as_posix()
    names += [name if below == "." else f"{below}/{name}" for name in files]
  return [
    name
    for name in names
    # With a dot: digests that are being written.
    if not name.startswith((".digests.", "digests."))
  ]


def _owner(name: str, hosts: int) -> int:
  """Returns the host whose files are in its own cache; the first one's else."""
  match = _OF_PROCESS.search(f"/{name}")
  number = int(match.group(1)) if match else 0
  return number if number < hosts else 0


def _digest(path: pathlib.Path) -> str:
  with open_regular(path) as file:
    return hashlib.file_digest(file, _hash).hexdigest()


def _digest_of(data: bytes) -> str:
  return _hash(data).hexdigest()


def _hash(data: bytes = b"") -> Any:
  return hashlib.blake2b(data, digest_size=16)


def _shorten(found: Sequence[Sequence[str]]) -> str:
  shown = ", ".join(f"{name} {what}" for name, what in found[:_SHOWN])
  more = len(found) - _SHOWN
  return shown + (f" and {more} more" if more > 0 else "")
