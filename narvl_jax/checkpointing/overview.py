"""Output of the command `checkpoints`: lists, damage and differences."""

import datetime
import math
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from narvl_jax.checkpointing import record_checks
from narvl_jax.checkpointing.digests import describe_digests, has_digests
from narvl_jax.checkpointing.integrity import Damage, examine
from narvl_jax.checkpointing.reading import FOLDER
from narvl_jax.checkpointing.record import (
  BrokenRecord,
  CheckpointRecord,
  RenamedCheckpoint,
  describe_shape,
  is_stored,
  read_leaf,
  read_record,
  stored_steps,
)
from narvl_jax.checkpointing.retention import Retention
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files.disk import size_and_time
from narvl_jax.run_folder.metrics import format_bytes
from narvl_jax.run_folder.workdir import CONFIG_FILE
from narvl_jax.terminal import progress
from narvl_jax.terminal.tables import format_columns
from narvl_jax.terminal.text import show

_NO_FOLDER = "it is a file, not a folder"


def list_checkpoints(workdir: pathlib.Path) -> str:
  """Returns a table of the checkpoints of a run.

  Raises:
    UserError: the run has no checkpoint.
  """
  folder = _folder(workdir)
  records = {step: _record(folder, step) for step in stored_steps(folder)}
  known = [x for x in records.values() if isinstance(x, CheckpointRecord)]
  kept = _reasons(known)
  rows = [("step", "saved", "size", "score", "kept as", "digests")]
  for step, record in records.items():
    place = folder / str(step)
    try:
      size, changed = size_and_time(place)
      saved = datetime.datetime.fromtimestamp(changed)
    except FileNotFoundError:
      # The run is training and has removed it.
      continue
    score = record.score if isinstance(record, CheckpointRecord) else None
    rows.append(
      (
        str(step),
        saved.isoformat(" ", timespec="seconds"),
        format_bytes(size),
        "-" if score is None else f"{score:.4f}",
        kept.get(step, "-") if isinstance(record, CheckpointRecord) else record,
        describe_digests(place),
      )
    )
  return _table(rows)


def verify(workdir: pathlib.Path, step: str | int | None = None) -> str:
  """Compares checkpoints with what was written; returns a line for each.

  Args:
    step: the checkpoint to read, "best" or "last"; all if None.

  Raises:
    UserError: checkpoints are damaged; their files and arrays are printed.
  """
  folder = _folder(workdir)
  steps = stored_steps(folder) if step is None else [_step(folder, step)]
  lines, damaged = [], []
  for number in steps:
    place = folder / str(number)
    if place.is_file():
      damaged.append(str(number))
      lines.append(f"{number}: DAMAGED\n  {_NO_FOLDER}")
      continue
    with progress.doing(f"reading the checkpoint of step {number}"):
      damage = _examine(place)
    if not is_stored(place):
      lines.append(f"{number}: removed meanwhile by the training run")
      continue
    if damage is None:
      digests = has_digests(place)
      how = "every file" if digests else "every array; it has no digests"
      lines.append(f"{number}: intact ({how})")
      continue
    damaged.append(str(number))
    lines.append(f"{number}: DAMAGED")
    for kind, found in damage.by_kind().items():
      lines += [f"  {kind} {name} {what}" for name, what in found]
  text = "\n".join(lines)
  if damaged:
    show(text)
    kind = "checkpoint" if len(damaged) == 1 else "checkpoints"
    raise UserError(
      f"{len(damaged)} of {len(steps)} read in {folder} damaged:"
      f" {kind} {', '.join(damaged)}; training sets a damaged newest one aside"
      " by itself, --checkpoint=STEP evaluates another one"
    )
  return text


def diff(first: pathlib.Path, second: pathlib.Path) -> str:
  """Returns a table of the arrays of two checkpoints that differ.

  Raises:
    UserError: one of them cannot be read.
  """
  with progress.doing("reading both checkpoints"):
    records = [_intact(place) for place in (first, second)]
  ours, theirs = (record.leaves for record in records)
  rows = [("array", "shape", "max |a - b|", "|a - b| / |a|")]
  same = 0
  for name in sorted(ours.keys() & theirs.keys()):
    a, b = ours[name], theirs[name]
    if a == b:
      same += 1
    elif a.shape != b.shape:
      shapes = f"{describe_shape(a.shape)} | {describe_shape(b.shape)}"
      rows.append((name, shapes, "-", "-"))
    else:
      rows.append(
        (name, describe_shape(a.shape), *_distance(first, second, name))
      )
  lines = [_table(rows)] if len(rows) > 1 else []
  for place, here, there in ((first, ours, theirs), (second, theirs, ours)):
    lines += [
      f"only in {place}: {x}" for x in sorted(here.keys() - there.keys())
    ]
  lines.append(f"{same} of {len(ours.keys() | theirs.keys())} arrays are equal")
  return "\n".join(lines)


def restore_config(workdir: pathlib.Path) -> str:
  """Restores a run's config from a checkpoint; returns a line for each file.

  Raises:
    UserError: no checkpoint is intact and contains a config.
  """
  folder = _folder(workdir)
  for step in reversed(stored_steps(folder)):
    record = _record(folder, step)
    if isinstance(record, CheckpointRecord) and record.config is not None:
      return "\n".join(record_checks.restore_config(workdir, record))
  raise UserError(
    f"no checkpoint in {folder} has an intact record with a config; restore"
    f" {workdir / CONFIG_FILE} from a copy"
  )


def _distance(
  first: pathlib.Path, second: pathlib.Path, name: str
) -> tuple[str, str]:
  a, b = (
    read_leaf(place, name).astype(np.float64) for place in (first, second)
  )
  apart = a - b
  largest = float(np.max(np.abs(apart), initial=0.0))
  norm = float(np.linalg.norm(a))
  relative = float(np.linalg.norm(apart)) / norm if norm else math.inf
  return f"{largest:.3e}", f"{relative:.3e}"


def _reasons(records: Sequence[CheckpointRecord]) -> dict[int, str]:
  """Returns step -> why the newest config keeps that checkpoint."""
  if not records or not records[-1].config:
    return {}
  train = records[-1].config["train"]
  retention = Retention(
    train["keep_last"], train["keep_best"], train["keep_every"]
  )
  scores = {record.step: record.score for record in records}
  reasons = retention.reasons(scores, scores)
  return {step: ", ".join(found) or "-" for step, found in reasons.items()}


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  folder = workdir / FOLDER
  if not folder.is_dir():
    raise UserError(
      f"{workdir} has no {FOLDER}; give the folder of a run or of converted"
      " weights"
    )
  if not stored_steps(folder):
    raise UserError(f"{folder} has no checkpoint yet")
  return folder


def _record(folder: pathlib.Path, step: int) -> CheckpointRecord | str:
  """Returns the record of a checkpoint, or the reason for its absence."""
  try:
    return read_record(folder / str(step))
  except RenamedCheckpoint as error:
    return str(error)
  except (OSError, BrokenRecord):
    return "damaged record"


def _examine(place: pathlib.Path) -> Damage | None:
  """Returns the damage of a checkpoint; None also if it was removed."""
  try:
    return examine(place)
  except OSError:
    if is_stored(place):
      raise
    return None


def _intact(place: pathlib.Path) -> CheckpointRecord:
  if place.is_file():
    raise UserError(
      f"{place} is damaged: {_NO_FOLDER}; compare another one: --checkpoint"
    )
  damage = _examine(place)
  if not is_stored(place):
    raise UserError(
      f"{place} was removed meanwhile by the run that is training there;"
      " compare another one: --checkpoint"
    )
  if damage is not None:
    raise UserError(
      f"{place} is damaged: {damage}; compare another one: --checkpoint"
    )
  return read_record(place)


def _step(folder: pathlib.Path, step: str | int) -> int:
  """Returns the step for "best", "last" or a number."""
  steps = [str(x) for x in stored_steps(folder)]
  if step in ("best", "last"):
    records = [_record(folder, int(x)) for x in steps]
    scored = [
      (x.score, x.step)
      for x in records
      if isinstance(x, CheckpointRecord) and x.score is not None
    ]
    return max(scored)[1] if scored and step == "best" else int(steps[-1])
  if str(step) not in steps:
    raise UserError(
      f'no checkpoint "{step}" in {folder}.{did_you_mean(str(step), steps)}'
      " (--checkpoint)"
    )
  return int(step)


def find_pair(
  workdirs: Sequence[pathlib.Path], steps: Sequence[str] | None
) -> list[pathlib.Path]:
  """Returns the folders of the two checkpoints to compare.

  Raises:
    UserError: not two checkpoints, or one that does not exist.
  """
  if steps is not None and len(steps) != 2:
    raise UserError(
      f"--checkpoint={','.join(steps)} is not two checkpoints, such as"
      " --checkpoint=best,last or --checkpoint=100,200"
    )
  if steps is None and len(workdirs) == 1:
    raise UserError(
      "diff of one run needs two checkpoints, such as --checkpoint=best,last;"
      " or give a second run"
    )
  folders = [_folder(workdirs[0]), _folder(workdirs[-1])]
  chosen = steps or [stored_steps(folder)[-1] for folder in folders]
  return [
    folder / str(_step(folder, step))
    for folder, step in zip(folders, chosen, strict=True)
  ]


def _table(rows: Sequence[Iterable[str]]) -> str:
  cells = [list(row) for row in rows]
  return format_columns(cells, left=len(cells[0]), rule=False)
