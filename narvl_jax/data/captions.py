"""Captions by picture, without the pictures."""

import collections
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from narvl_jax.data.batches.bad_records import read_good
from narvl_jax.data.example import Record
from narvl_jax.errors import UserError
from narvl_jax.files.regular import read_regular

_MOST_BYTES = 4 << 30


def coco_captions(path: str | os.PathLike[str]) -> dict[int | str, list[str]]:
  """Returns picture -> its captions of a COCO file.

  Raises:
    UserError: the file cannot be read, or has other content than
      {"annotations": [{"image_id", "caption"}]}.
  """
  form = 'COCO captions {"annotations": [{"image_id": 1, "caption": "a dog"}]}'
  with json_file(path, form) as content:
    annotations = content["annotations"]
    pairs = [(entry["image_id"], entry["caption"]) for entry in annotations]
    if not all(isinstance(caption, str) for _, caption in pairs):
      raise ValueError("a caption is not a text")
  return _by_picture(pairs)


@contextlib.contextmanager
def json_file(path: str | os.PathLike[str], form: str) -> Iterator[Any]:
  """Yields the content of a JSON file; errors name its `form`."""
  try:
    yield json.loads(read_regular(path, _MOST_BYTES))
  except OSError as error:
    raise UserError(f'"{path}": {error.strerror or error}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'"{path}" is not a file of {form} ({type(error).__name__}: {error})'
    ) from error


def source_captions(
  source: Sequence[Record], *, max_examples: int = 0
) -> dict[bytes, list[str]]:
  """Returns digest of a picture -> its captions.

  Records with the same picture, such as the rows of OFA's training file, are
  united.

  Args:
    source: records of the task caption; bad ones are skipped with a warning.
    max_examples: number of records to read, from the first; 0 reads all.

  Raises:
    UserError: the source is endless.
  """
  found = read_good(
    source, "caption", _captions, "reading captions", max_examples
  )
  return _by_picture((image, text) for image, texts in found for text in texts)


def _captions(record: Record) -> tuple[bytes, list[str]]:
  image = record.image
  content = image if isinstance(image, bytes) else image.tobytes()
  return hashlib.blake2b(content, digest_size=16).digest(), [*record.answers]


def _by_picture(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
  captions = collections.defaultdict(list)
  for picture, text in pairs:
    captions[picture].append(text)
  return dict(captions)
