"""Whether `config.json` is the config that a checkpoint was trained with."""

import json
import pathlib
from typing import Any

from narvl_jax.checkpointing.record import CheckpointRecord
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import from_json, to_json
from narvl_jax.files.disk import write_text
from narvl_jax.run_folder import workdir as workdir_lib

# Settings that change no answer of a trained model, such as where its data lie
# on another machine. A difference is reported, and does not matter.
_REPORTED_KEYS = (
  "data.train.",
  "data.evaluation.",
  "train.",
  "evaluation.split",
  "evaluation.batch_size",
  "evaluation.max_examples",
  "evaluation.best_metric",
)
_SHOWN = 4


def check_recorded(
  workdir: pathlib.Path,
  config: Any,
  record: CheckpointRecord,
  *,
  resumes: bool = False,
) -> list[str]:
  """Compares the config of a run folder with that of a checkpoint.

  Settings that a resumed run may change can differ (`workdir.FREE_KEYS`).

  Args:
    workdir: the run folder.
    config: of its `config.json`.
    record: of the checkpoint; without a config, nothing is compared.
    resumes: whether the run is trained on; then all others must be the same.

  Returns:
    Notes about differences that change no answer.

  Raises:
    UserError: another setting differs.
  """
  if record.config is None:
    return []
  # Through `from_json`, so that settings that came later do not differ.
  ours, theirs = to_json(config), to_json(from_json(record.config))
  found = {
    key: values
    for key, values in workdir_lib.diff(theirs, ours).items()
    if not key.startswith(workdir_lib.FREE_KEYS)
  }
  path = workdir / workdir_lib.CONFIG_FILE
  refused = {
    key: values
    for key, values in found.items()
    if resumes or not key.startswith(_REPORTED_KEYS)
  }
  if refused:
    raise UserError(
      f"{path} is not what the checkpoint of step {record.step} was trained"
      f" with: {_describe(refused)}; write it again:"
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

  Args:
    workdir: the run folder.
    fingerprint: of its vocabulary.
    record: of the checkpoint; without a fingerprint, nothing is compared.

  Raises:
    UserError: they differ.
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
  """Writes `config.json` as a checkpoint was trained with it.

  Args:
    workdir: the run folder; what it has there becomes `config.json.old`.
    record: of a checkpoint.

  Returns:
    A line for each file.

  Raises:
    UserError: the record holds no config, or a file cannot be written.
  """
  path = workdir / workdir_lib.CONFIG_FILE
  if record.config is None:
    raise UserError(
      f"the checkpoint of step {record.step} holds no config; bring {path} back"
      " from a copy"
    )
  lines = []
  if path.exists():
    old = path.with_name(f"{path.name}.old")
    path.replace(old)
    lines.append(f"kept {old}")
  write_text(path, json.dumps(record.config, indent=2) + "\n", inside=workdir)
  return [*lines, f"wrote {path}, as step {record.step} was trained with it"]


def _describe(found: dict[str, tuple[str, str]]) -> str:
  shown = "; ".join(
    f"{key} is {ours} there and {theirs} in the checkpoint"
    for key, (theirs, ours) in sorted(found.items())[:_SHOWN]
  )
  more = len(found) - _SHOWN
  return shown + (f"; and {more} more" if more > 0 else "")
