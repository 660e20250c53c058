"""Reads the picture and the texts of one request."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from absl import flags

from narvl_jax.data.answer_text import checked_text
from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.record_checks import checked_record
from narvl_jax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Request:
  """One request, about a picture file or about a record of the run's data.

  Attributes:
    task: one of the run's tasks; may be None if there is only one.
    image: picture file; see docs/data.md.
    example: index of a record, instead of `image`.
    dataset: entry of `data.evaluation` with the record; the task's first if "".
    split: split of that data set; `evaluation.split` if "".
    prompt: question, expression or hypothesis; that of the record if None.
      Captions ignore it.
    premise: entailment only: a true caption of the picture.
  """

  task: str | None = None
  image: str | os.PathLike[str] | None = None
  example: int | None = None
  dataset: str = ""
  split: str = ""
  prompt: str | None = None
  premise: str | None = None

  @classmethod
  def from_flags(cls) -> Self:
    """Returns the request of the flags, see `command_line.flags.request`."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: getattr(flags.FLAGS, name) for name in names})

  def check(self) -> None:
    """Raises UserError unless there is either a file or a record."""
    if (self.image is None) == (self.example is None):
      raise UserError(
        "give a picture: either --image=FILE or --example=INDEX of the test"
        " data"
      )

  def read(self, config: Any) -> Record:
    """Returns the request as a record with a decoded picture.

    Args:
      config: config of the run.

    Raises:
      UserError: picture, task or text is wrong or missing.
    """
    task = _choose_task(list(config.tasks), self.task)
    if self.image is not None:
      picture = read_picture(self.image, config.data.exif_orientation)
      record = Record(pathlib.Path(self.image).name, task, picture)
    else:
      record = _load_example(
        config, task, self.example or 0, self.dataset, self.split
      )
    if self.prompt is not None or self.premise is not None:
      # The truth of another text is unknown.
      record = dataclasses.replace(
        record,
        prompt=record.prompt if self.prompt is None else self.prompt,
        premise=record.premise if self.premise is None else self.premise,
        answers={},
        box=None,
      )
    if task == "caption":
      record = dataclasses.replace(record, prompt="")
    _check_texts(record, config.tasks[task])
    return record


def read_picture(
  path: str | os.PathLike[str], exif_orientation: str = "ignore"
) -> np.ndarray:
  """Returns a picture file as uint8 [H, W, 3], in its own size.

  Args:
    path: regular file.
    exif_orientation: "ignore" or "apply"; see `data.exif_orientation`.

  Raises:
    UserError: the file is missing or not a complete picture.
  """
  data = images.read_image_file(path)
  data = images.with_orientation(data, exif_orientation)
  try:
    width, height = images.original_size(data)
    return images.prepare_image(data, (height, width))
  except UserError as error:
    raise UserError(f'--image="{os.fspath(path)}": {error}') from error


def _choose_task(tasks: Sequence[str], wanted: str | None) -> str:
  if wanted is None and len(tasks) == 1:
    return tasks[0]
  if wanted is None or wanted not in tasks:
    seen = "no task was given" if wanted is None else f'unknown task "{wanted}"'
    hint = did_you_mean(wanted or "", tasks)
    raise UserError(f"{seen}.{hint} Set --task.")
  return wanted


def _load_example(
  config: Any, task: str, index: int, dataset: str, split: str
) -> Record:
  """Returns a record of the evaluation data with its picture decoded."""
  # Imported here, so that --help of the commands is fast.
  from narvl_jax.experiment.datasets import load_dataset

  split = split or config.evaluation.split
  names = [k for k, v in config.data.evaluation.items() if v.task == task]
  if dataset and dataset not in names:
    raise UserError(
      f'data.evaluation has no "{dataset}" for the task {task}.'
      f"{did_you_mean(dataset, names)} (--dataset)"
    )
  names = [dataset] if dataset else names
  if not names:
    raise UserError(
      f'this run has no {split} data for "{task}"; pass a picture with --image'
    )
  source = load_dataset(config, names[0], split)
  if not 0 <= index < len(source):
    nearest = min(max(index, 0), len(source) - 1)
    raise UserError(
      f"--example={index} is outside of the {len(source)} records of"
      f' {split} data "{names[0]}"; nearest valid: --example={nearest}'
    )
  record = checked_record(source[index])
  width, height = images.original_size(record.image)
  pixels = images.prepare_image(record.image, (height, width))
  return dataclasses.replace(record, image=pixels)


def _check_texts(record: Record, settings: Mapping[str, Any]) -> None:
  """Raises UserError for texts without tokens or with too many words."""
  limit = settings.get("max_source_words", 0)
  for flag in ("prompt", "premise"):
    try:
      words = len(checked_text(getattr(record, flag)).split())
    except UserError as error:
      raise UserError(f"--{flag}: {error}") from error
    if limit and words > limit:
      raise UserError(
        f"--{flag} has {words} words, the run reads at most {limit}; shorten"
        f" it, or train with --config.tasks.{record.task}.max_source_words="
        f"{words}"
      )
