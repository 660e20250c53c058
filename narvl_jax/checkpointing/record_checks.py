"""Compares the record of a checkpoint with a run folder and a model."""

import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from narvl_jax.checkpointing.record import (
  ArrayRecord,
  CheckpointRecord,
  describe_shape,
  item_of,
)
from narvl_jax.errors import UserError, list_few
from narvl_jax.experiment.config import from_json, to_json
from narvl_jax.experiment.config_table import may_change
from narvl_jax.files.disk import write_json
from narvl_jax.run_folder import workdir as workdir_lib

# Number of settings, and of arrays of each kind, in a message.
_SHOWN_KEYS, _SHOWN_ARRAYS = 4, 3


def check_config(
  workdir: pathlib.Path,
  config: Any,
  record: CheckpointRecord,
  *,
  resumes: bool = False,
) -> list[str]:
  """Compares the config of a run folder with that of a checkpoint.

  Settings that a resumed run may change (`setting.Change`) are ignored.

  Args:
    config: read from its `config.json`.
    record: record of the checkpoint; without a config nothing is compared.
    resumes: whether training continues; then all other settings must be equal.

  Returns:
    Notes about differences that do not change any prediction.

  Raises:
    UserError: another setting differs.
  """
  if record.config is None:
    return []
  # `from_json` adds settings that are newer than the record.
  ours, theirs = to_json(config), to_json(from_json(record.config))
  found = {
    key: values
    for key, values in workdir_lib.diff(theirs, ours).items()
    if not may_change(key, "resume")
  }
  path = workdir / workdir_lib.CONFIG_FILE
  rejected = {
    key: values
    for key, values in found.items()
    if resumes or not may_change(key, "resume", "report")
  }
  if rejected:
    raise UserError(
      f"{path} is not what the checkpoint of step {record.step} was trained"
      f" with: {_describe(rejected)}; write it again:"
      f" {workdir_lib.RESTORE_COMMAND} {workdir}"
    )
  if not found:
    return []
  return [
    f"{path} differs from the config of the checkpoint of step {record.step}:"
    f" {_describe(found)}"
  ]


def check_vocabulary(
  workdir: pathlib.Path, fingerprint: str, record: CheckpointRecord
) -> None:
  """Compares the vocabulary of a run folder with that of a checkpoint.

  Raises:
    UserError: the record has another fingerprint; without one nothing is
      compared.
  """
  if record.vocabulary not in (None, fingerprint):
    raise UserError(
      f"{workdir / 'vocabulary'} is not the vocabulary that the checkpoint of"
      f" step {record.step} was trained with: its fingerprint is"
      f" {fingerprint[:12]}, not {record.vocabulary[:12]}; bring that one back"
      " from a copy of the run"
    )


def restore_config(
  workdir: pathlib.Path, record: CheckpointRecord
) -> list[str]:
  """Writes `config.json` from a record; returns a line for each file.

  Raises:
    UserError: the record has no config, or a file cannot be written.
  """
  path = workdir / workdir_lib.CONFIG_FILE
  if record.config is None:
    raise UserError(
      f"the checkpoint of step {record.step} has no config; restore {path}"
      " from a copy"
    )
  lines = []
  if path.exists():
    old = path.with_name(f"{path.name}.old")
    path.replace(old)
    lines.append(f"kept {old}")
  write_json(path, record.config, inside=workdir)
  return [*lines, f"wrote {path}, as step {record.step} was trained with it"]


def check_arrays(
  record: CheckpointRecord,
  wanted: Mapping[str, Any],
  workdir: pathlib.Path,
  *,
  dtypes: bool = True,
) -> None:
  """Compares the arrays of a checkpoint with those that a model needs.

  Args:
    wanted: name -> shape and dtype; items without any wanted array are
      ignored.
    workdir: the run folder, for the message.
    dtypes: whether dtypes must be equal.

  Raises:
    UserError: they differ; the error names missing, unknown and different
      arrays, the nearest names, and flags to start a run from the checkpoint.
  """
  items = {item_of(name) for name in wanted}
  there = {
    name: leaf for name, leaf in record.leaves.items() if item_of(name) in items
  }
  unknown = sorted(there.keys() - wanted.keys())
  missing = [
    _with_near(name, unknown) for name in sorted(wanted.keys() - there.keys())
  ]
  different = [
    difference
    for name in sorted(wanted.keys() & there.keys())
    if (difference := _differ(name, there[name], wanted[name], dtypes))
  ]
  if not (missing or unknown or different):
    return
  parts = {
    "missing there": missing,
    "unknown here": unknown,
    "different": different,
  }
  found = "; ".join(
    f"{kind}: {list_few(names, _SHOWN_ARRAYS)}"
    for kind, names in parts.items()
    if names
  )
  raise UserError(
    f"the checkpoint of step {record.step} in {workdir} is of another model:"
    f" {found}; start a run from the weights that fit"
    f" with --config.init_from={workdir} and another --workdir;"
    " --config.init_renames maps other names, --config.init_drops names what"
    " starts fresh"
  )


def _describe(found: dict[str, tuple[str, str]]) -> str:
  parts = [
    f"{key} is {ours} there and {theirs} in the checkpoint"
    for key, (theirs, ours) in sorted(found.items())
  ]
  return list_few(parts, _SHOWN_KEYS, "; ")


def _differ(name: str, there: ArrayRecord, here: Any, dtypes: bool) -> str:
  if there.shape != tuple(here.shape):
    shapes = describe_shape(there.shape), describe_shape(here.shape)
    return "{} has {} there and {} here".format(name, *shapes)
  if dtypes and there.dtype != str(here.dtype):
    return f"{name} is {there.dtype} there and {here.dtype} here"
  return ""


def _with_near(name: str, others: Sequence[str]) -> str:
  near = difflib.get_close_matches(name, others, n=1, cutoff=0.8)
  return f"{name} (near: {near[0]})" if near else name
