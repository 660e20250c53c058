"""Detects whether a checkpoint on disk was changed after the save.

The record contains checksums of the arrays (`checksums`), taken on the devices
before the save. `digests` of the files are written after it. A checkpoint of a
run that was killed in between has no digests; its arrays are read and compared
instead.
"""

import pathlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from narvl_jax.checkpointing import checksums
from narvl_jax.checkpointing.digests import (
  NOT_REGULAR,
  check_files,
  read_digests,
)
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
)
from narvl_jax.errors import UserError, list_few

# Number of files, and of arrays, in a message.
_SHOWN = 3

# Value of this host -> values of all.
Gather = Callable[[Any], Sequence[Any]]


class Damage(NamedTuple):
  """The damage of a checkpoint.

  Attributes:
    files: [path below its folder, damage]; "/" at the end marks the folder
      itself.
    leaves: [array, damage].
  """

  files: list[list[str]]
  leaves: list[list[str]]

  def by_kind(self) -> dict[str, list[list[str]]]:
    """Returns the damage of the folder, its files and its arrays."""
    folders = [[x[:-1], what] for x, what in self.files if x.endswith("/")]
    files = [x for x in self.files if not x[0].endswith("/")]
    return {"folder": folders, "file": files, "array": self.leaves}

  def __str__(self) -> str:
    return "; ".join(
      f"{kind} {list_few([' '.join(x) for x in found], _SHOWN)}"
      for kind, found in self.by_kind().items()
      if found
    )


class DamagedCheckpoint(UserError):
  """A checkpoint was changed after the save; has its `step` and `damage`."""

  def __init__(self, step: int, damage: Damage, advice: str = "") -> None:
    text = f"the checkpoint of step {step} is damaged: {damage}"
    super().__init__(f"{text}; {advice}" if advice else text)
    self.step = step
    self.damage = damage


def examine(
  folder: pathlib.Path,
  host: int = 0,
  hosts: int = 1,
  gather: Gather = lambda value: [value],
) -> Damage | None:
  """Compares a checkpoint with its digests and checksums.

  Hosts share the work and return the same result.

  Args:
    gather: returns the values of all hosts, on each host.
  """
  digests = read_digests(folder)
  problems = check_files(folder, digests, host, hosts)
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
  complete = all(complete for _, complete in shared)
  if complete and not files:
    return None
  # The arrays in a damaged file are unknown, but its item is known.
  suspects = set(ITEMS)
  if complete:
    suspects &= {name.split("/", 1)[0] for name, _ in files}
  # Reading the arrays of an item that contains a pipe would not end.
  suspects -= {
    name.split("/", 1)[0] for name, what in files if what == NOT_REGULAR
  }
  leaves = []
  if record is not None:
    leaves = _check_leaves(folder, record, suspects, host, hosts)
  damage = Damage(files, _merge(gather(leaves)))
  return damage if damage.files or damage.leaves else None


def compare_leaves(
  record: CheckpointRecord, names: Sequence[str], found: Any
) -> list[list[str]]:
  """Returns the arrays whose checksums differ from those in the record.

  Args:
    found: their checksums, uint32 [len(names), 2].
  """
  return [
    [name, "has other values than those that were saved"]
    for name, checksum in zip(names, found, strict=True)
    if checksums.text(checksum) != record.leaves[name].checksum
  ]


def _check_leaves(
  folder: pathlib.Path,
  record: CheckpointRecord,
  items: Collection[str],
  host: int,
  hosts: int,
) -> list[list[str]]:
  """Reads this host's share of the arrays of some items, one at a time."""
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
  """Returns the findings of all hosts without repetitions."""
  return [list(x) for x in sorted({tuple(x) for part in found for x in part})]
