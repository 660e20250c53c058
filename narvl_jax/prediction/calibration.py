"""Temperatures of a run, fitted on a validation split: calibration.json."""

import dataclasses
import os
import pathlib
from typing import Any

from narvl_jax.files import side_files
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import as_path

FILE = "calibration.json"


@dataclasses.dataclass(frozen=True)
class Calibration:
  """The content of the file.

  Attributes:
    step: checkpoint to which it belongs.
    decoding: name of the decoding, see `decodings.decoding_name`.
    split: data on which it was fitted.
    tasks: task -> temperature, examples, ece_before, ece_after, ece_by_chance
      (expected calibration errors in [0, 1]) and thresholds (wanted accuracy ->
      None if it is not reached, or threshold, coverage and accuracy).
  """

  step: int
  decoding: str
  split: str
  tasks: dict[str, dict[str, Any]]

  @property
  def temperatures(self) -> dict[str, float]:
    """Task -> temperature."""
    return {task: found["temperature"] for task, found in self.tasks.items()}

  def write(self, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the file into a run folder, atomically."""
    path = as_path(workdir) / FILE
    side_files.make_way(path)
    write_json(path, dataclasses.asdict(self), inside=as_path(workdir))
    return path


def read_temperatures(
  workdir: str | os.PathLike[str], step: int, decoding: str
) -> tuple[dict[str, float], str]:
  """Returns the temperatures of a checkpoint and its decoding.

  A damaged file is set aside with a warning.

  Returns:
    Task -> temperature, and the reason why the file of the run does not fit, as
    a sentence; {} and "" if there is none.
  """
  path = as_path(workdir) / FILE
  content = side_files.read_object(path, _is_valid)
  if content is None:
    return {}, ""
  found = Calibration(**content)
  if (found.step, found.decoding) == (step, decoding):
    return found.temperatures, ""
  return {}, (
    f"{FILE} is for step {found.step} and decoding {found.decoding}, not for"
    f" step {step} and {decoding}: probabilities are not calibrated; run"
    f" python -m narvl_jax.calibrate --workdir={workdir}"
  )


def _is_valid(content: dict[str, Any]) -> bool:
  names = {field.name for field in dataclasses.fields(Calibration)}
  tasks = content.get("tasks")
  if set(content) != names or not isinstance(tasks, dict):
    return False
  return all(
    isinstance(found, dict)
    and isinstance(found.get("temperature"), (int, float))
    and found["temperature"] > 0
    for found in tasks.values()
  )
