"""Where the metrics of a run go besides `metrics.jsonl`."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from narvl_jax.errors import UserError
from narvl_jax.run_folder.services import SERVICES, Service
from narvl_jax.run_folder.tensorboard import Board


class Tracker(Protocol):
  """Receives the metrics of a run."""

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds finite values of a step."""

  def write_image(self, step: int, name: str, path: pathlib.Path) -> None:
    """Adds a picture of a step."""

  def go_back(self, step: int) -> None:
    """Prepares for the steps after `step`, which are written once more."""

  def flush(self) -> None:
    """Writes what is buffered."""

  def close(self, failed: bool) -> None:
    """Ends the tracking; `failed`: the run has not finished."""


def check_trackers(config: Any) -> None:
  """Checks that the trackers of a valid config can be used.

  Raises:
    UserError: the package of a tracker is not installed, or a project is
      missing.
  """
  for name in config.tracking.trackers:
    key = f'config.tracking.trackers: "{name}"'
    if name not in SERVICES:
      continue
    if importlib.util.find_spec(name) is None:
      raise UserError(
        f"{key} needs the package {name}; install it: pip install"
        f' "narvl_jax[{name}]" or pip install {name}'
      )
    if not config.tracking.project:
      raise UserError(
        f"{key} needs a project, such as --config.tracking.project=narvl_jax"
      )


def open_trackers(
  workdir: pathlib.Path,
  folder: pathlib.Path,
  resumed_step: int,
  config: Mapping[str, Any] | None,
) -> list[Tracker]:
  """Opens the trackers of a config; only TensorBoard without a config.

  Args:
    workdir: the run folder.
    folder: local folder for the files of TensorBoard.
    config: the resolved config.

  Raises:
    OSError: a file of TensorBoard cannot be written.
  """
  names = ("tensorboard",) if config is None else config["tracking"]["trackers"]
  found: list[Tracker] = []
  if "tensorboard" in names:
    found.append(Board(folder / "tensorboard", resumed_step + 1))
  for name in SERVICES:
    if config is not None and name in names:
      found.append(Service(name, workdir, config))
  return found
