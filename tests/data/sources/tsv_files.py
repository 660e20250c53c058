"""OFA TSV files, written by the tests that read them."""

import base64
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

# Fields of a row besides the picture, in the order of the file.
FIELDS = {
  "caption": ["{i}", "im{i}", "a dog {i}&&two cats", "dog&&cat", "IMAGE"],
  "vqa": [
    "{i}",
    "im{i}",
    "how many dogs, {i}?",
    "0.6|!+two&&0.9|!+{i}",
    "dog&&big tree",
    "IMAGE",
  ],
  "grounding": ["{i}", "im{i}", "left dog {i}", "1.5,2,11.25,9", "IMAGE"],
  "entailment": [
    "{i}",
    "im{i}",
    "IMAGE",
    "animals outside {i}",
    "two dogs run",
    "neutral",
  ],
}


def picture(index: int, size: tuple[int, int] = (16, 12)) -> bytes:
  """Returns a JPEG of one colour that depends on the index."""
  width, height = size
  pixels = np.full((height, width, 3), 40 + index % 200, np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG")
  return file.getvalue()


def row(task: str, index: int, changes: dict[int, str | bytes] | None = None):
  """Returns one row without its end, as bytes.

  Args:
    task: which layout.
    index: is told in id, texts and picture.
    changes: column -> another value.
  """
  fields: list[bytes] = []
  for field in FIELDS[task]:
    if field == "IMAGE":
      fields.append(base64.b64encode(picture(index)))
    else:
      fields.append(field.replace("{i}", str(index)).encode())
  for column, value in (changes or {}).items():
    fields[column] = value if isinstance(value, bytes) else value.encode()
  return b"\t".join(fields)


def write(
  path: pathlib.Path, rows: Iterable[bytes], end: bytes = b"\n"
) -> pathlib.Path:
  """Writes rows, each with an end."""
  path.write_bytes(b"".join(r + end for r in rows))
  return path
