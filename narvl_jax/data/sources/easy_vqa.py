"""The published easy-VQA data set, read from its PyPI package.

5,000 pictures of 64x64 pixels with one shape each; 38,575 training and 9,673
test questions with 13 answers (https://github.com/vzhou842/easy-VQA, MIT).
The package has no validation split. A tenth of the training pictures serves as
one, with all their questions: those whose ids have the largest SHA-256.
"""

import functools
import hashlib
import importlib
import pathlib

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources.base import RecordSource
from narvl_jax.errors import UserError, did_you_mean

SPLITS = ("train", "validation", "test")
VALIDATION_IMAGES = 400


class EasyVQASource(RecordSource):
  """Questions about single shapes; kinds color, shape, existence, absence.

  Splits: "train" (34,788 questions), "validation" (3,787), "test" (9,673).
  Pictures are PNG bytes, read at first use and then kept.

  Attributes:
    full_train: the train split includes the validation pictures.
  """

  def __init__(
    self, *, task: str, split: str, full_train: bool = False
  ) -> None:
    """Reads the questions.

    Raises:
      UserError: the task is not vqa, the split is unknown, `full_train` is set
        for another split than train, or the package is not installed.
    """
    if task != "vqa":
      raise UserError(
        f'easy_vqa has questions only, not task "{task}". '
        "Set data.train.NAME.task=vqa."
      )
    if split not in SPLITS:
      raise UserError(
        f'easy_vqa: unknown split "{split}".{did_you_mean(split, SPLITS)} '
        "Set --split, or data.train.NAME.split."
      )
    if full_train and split != "train":
      raise UserError(
        f'easy_vqa: full_train=True is for split "train", got "{split}". '
        "Drop options.full_train."
      )
    self.task, self.split, self.full_train = task, split, full_train
    published = "test" if split == "test" else "train"
    questions, self._paths, self._images = _load(published)
    if split == "test" or full_train:
      self._rows = questions
    else:
      aside = _validation_images(frozenset(self._paths))
      self._rows = [
        row for row in questions if (row[3] in aside) == (split == "validation")
      ]
    self._prefix = f"easy_vqa-{published}"

  def __len__(self) -> int:
    return len(self._rows)

  def _read(self, number: int) -> Record:
    row, question, answer, image_id = self._rows[number]
    image = self._images.get(image_id)
    if image is None:
      image = self._images[image_id] = images.read_image_file(
        self._paths[image_id], "reinstall the package easy-vqa"
      )
    return Record(
      id=f"{self._prefix}-{row}",
      task="vqa",
      image=image,
      prompt=question,
      answers={answer: 1.0},
      kind=kind(question, answer),
    )


def kind(question: str, answer: str) -> str:
  """Returns what a question asks for: color, shape, existence or absence."""
  words = question.split()
  if answer in ("yes", "no"):
    return "absence" if "not" in words or "no" in words else "existence"
  return "color" if "color" in words else "shape"


# Number, question, answer, image id.
_Row = tuple[int, str, str, int]


@functools.cache
def _load(
  published: str,
) -> tuple[list[_Row], dict[int, pathlib.Path], dict[int, bytes]]:
  """Returns rows, {image id: path}, and an empty cache of read pictures."""
  try:
    package = importlib.import_module("easy_vqa")
  except ImportError as error:
    raise UserError(
      "The source easy_vqa needs the package easy-vqa, which is not "
      "installed. Run: pip install easy-vqa"
    ) from error
  if published == "test":
    columns = package.get_test_questions()
    paths = package.get_test_image_paths()
  else:
    columns = package.get_train_questions()
    paths = package.get_train_image_paths()
  rows = [(i, *row) for i, row in enumerate(zip(*columns, strict=True))]
  return rows, {i: pathlib.Path(path) for i, path in paths.items()}, {}


@functools.cache
def _validation_images(ids: frozenset[int]) -> frozenset[int]:
  def digest(image_id: int) -> str:
    return hashlib.sha256(str(image_id).encode()).hexdigest()

  return frozenset(sorted(ids, key=digest)[-VALIDATION_IMAGES:])
