"""Serialization of a record in a shard.

Schema 1: one MessagePack map a record, with the fields of `Record` by name:

| key        | value                                                       |
| ---------- | ----------------------------------------------------------- |
| id         | str                                                         |
| task       | str, one of `TASKS`                                         |
| image      | bin: an encoded picture file (arrays are stored as PNG)     |
| prompt     | str                                                         |
| answers    | array of [str, float], in the order of the source           |
| box        | array of 4 floats: x0, y0, x1, y1 in pixels of `image`      |
| premise    | str                                                         |
| objects    | array of str; absent for None, which is not an empty array  |
| kind       | str                                                         |
| score      | float: log-probability of a teacher's answer                |
| annotators | int: people whose answers determine the scores              |
| people     | array of str: the answers of these people                   |
| question_type | str                                                      |

Fields with their default value are left out, except `id`, `task` and `image`.
Numbers are 64-bit floats.
"""

import io
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.record_checks import checked_record
from narvl_jax.errors import UserError

SCHEMA_VERSION = 1
_TEXTS = ("id", "task", "prompt", "premise", "kind", "question_type")


def serialize(record: Record) -> bytes:
  """Returns a record as bytes.

  Raises:
    UserError: the picture is invalid, or a field has a wrong type.
  """
  fields: dict[str, Any] = {
    "id": record.id,
    "task": record.task,
    "image": encoded_image(record.image),
    "prompt": record.prompt,
    "answers": [[a, float(score)] for a, score in record.answers.items()],
    "box": None if record.box is None else [float(c) for c in record.box],
    "premise": record.premise,
    "kind": record.kind,
    "question_type": record.question_type,
    "annotators": record.annotators,
    "people": list(record.people),
  }
  kept = {key: value for key, value in fields.items() if value}
  kept["id"] = record.id
  if record.objects is not None:
    kept["objects"] = list(record.objects)
  if record.score is not None:
    kept["score"] = float(record.score)
  try:
    # Texts may contain unpaired surrogates.
    data = msgpack.packb(
      kept, use_bin_type=True, unicode_errors="surrogatepass"
    )
  except (TypeError, ValueError, OverflowError) as e:
    raise UserError(f"the record cannot be stored: {e}") from e
  assert data is not None
  return data


def deserialize(data: bytes) -> Record:
  """Returns the record from the bytes of `serialize`.

  Raises:
    UserError: the bytes are damaged or have another form, or a field is wrong.
  """
  try:
    fields = msgpack.unpackb(
      data, raw=False, strict_map_key=True, unicode_errors="surrogatepass"
    )
    record = Record(
      **{key: fields.get(key, "") for key in _TEXTS},
      image=fields["image"],
      answers=dict(fields.get("answers", ())),
      box=fields.get("box"),
      objects=fields.get("objects"),
      score=fields.get("score"),
      annotators=fields.get("annotators", 0),
      people=fields.get("people", ()),
    )
  except Exception as e:  # Damaged bytes raise errors of many types.
    raise UserError(
      f"the stored record is damaged ({type(e).__name__}: {e}); check the"
      " folder with python -m narvl_jax.convert_data DIR --verify"
    ) from e
  if not isinstance(record.image, bytes) or record.task not in TASKS:
    raise UserError(
      f'the stored record has the task "{record.task}" and a picture of type'
      f" {type(record.image).__name__}; convert the data again"
    )
  return checked_record(record)


def encoded_image(image: bytes | np.ndarray) -> bytes:
  """Returns an encoded picture unchanged and an array as PNG.

  Raises:
    UserError: the image is empty or invalid.
  """
  if isinstance(image, bytes):
    if not image:
      raise UserError("the image is empty: 0 bytes")
    return image
  images.original_size(image)  # Raises for an invalid array.
  out = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
  return out.getvalue()
