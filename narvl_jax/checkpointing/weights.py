"""Weights in the folder of another run: finding and reading them."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util

from narvl_jax.checkpointing.chosen import choose_step
from narvl_jax.checkpointing.integrity import DamagedCheckpoint
from narvl_jax.checkpointing.record_checks import check_config
from narvl_jax.checkpointing.writing import FOLDER, Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder.workdir import is_run, read_config
from narvl_jax.state.parameters import flatten


@contextlib.contextmanager
def opened(path: str, key: str) -> Iterator[tuple[Checkpoints, int]]:
  """Opens the checkpoints of a folder; yields them and the best step.

  Args:
    path: folder of a run or of converted weights.
    key: config key that names the folder, for messages.

  Raises:
    UserError: there is no checkpoint, or the `with` body read a damaged one.
  """
  place, named, flag = as_path(path), f'{key}="{path}"', f"--config.{key}"
  if place.is_file():
    raise UserError(
      f"{named} is a file; convert it first: python -m"
      f" narvl_jax.convert --from={path} --to=FOLDER, then"
      f" {flag}=FOLDER"
    )
  if not place.exists():
    raise UserError(f"{named}: there is no such folder ({flag})")
  if not (place / FOLDER).is_dir():
    raise UserError(
      f"{named} has no {FOLDER}; it must be the folder of a run"
      f" or of converted weights ({flag})"
    )
  with Checkpoints(path) as checkpoints:
    try:
      step = choose_step(checkpoints, "best")
    except UserError as error:
      raise UserError(f"{named} has no checkpoint yet ({flag})") from error
    try:
      if is_run(place):
        record = checkpoints.read_record(step)
        check_config(place, read_config(place), record)
      yield checkpoints, step
    except DamagedCheckpoint as error:
      raise UserError(
        f"{named}: the checkpoint of step {error.step} is damaged:"
        f" {error.damage}; move {place / FOLDER / str(error.step)} away to use"
        f" another one of this folder, or name another folder ({flag})"
      ) from error


def read_weights(
  checkpoints: Checkpoints, step: int, target: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads the weights of a checkpoint; the moving averages if it has them.

  Args:
    target: shapes, dtypes and shardings of {"params", "batch_stats"}.
  """
  ema = checkpoints.shapes(step).get("ema")
  if ema is not None:
    wanted = flatten(target)
    # Parameters that were frozen there have no average.
    ema = {name: wanted[name] for name in flatten(ema)}
    ema = flax.traverse_util.unflatten_dict(ema, sep="/")
    ema = {"batch_stats": {}, **ema}
  return checkpoints.restore_variables(step, target, ema)
