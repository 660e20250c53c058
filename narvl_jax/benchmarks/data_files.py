"""Files like those of real data sets, for `narvl_jax.benchmarks.data`."""

import base64
import io
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

# Different pictures; more rows repeat them with other texts.
_PICTURES = 64
_QUALITY = 92
_THINGS = ("dog", "bicycle", "lamp", "tree", "cup", "train", "kite", "horse")
_COLOURS = ("red", "green", "blue", "yellow", "white", "black")


def photo(number: int, width: int, height: int) -> bytes:
  """Returns a JPEG with details like a photo: noise of all scales, edges.

  Args:
    number: seed of the picture.
    width: in pixels.
    height: in pixels.
  """
  rng = np.random.default_rng(number)
  total = np.zeros((height, width, 3), np.float32)
  side = 4
  while side <= max(width, height):
    noise = rng.standard_normal((side * 3 // 4 + 1, side, 3)).astype(np.float32)
    layers = [
      Image.fromarray(noise[..., c]).resize(
        (width, height), Image.Resampling.BICUBIC
      )
      for c in range(3)
    ]
    # Energy falls with the scale, as it does in photos.
    total += np.stack([np.asarray(x) for x in layers], -1) / side**0.65
    side *= 2
  pixels = np.clip(128 + 150 * total, 0, 255).astype(np.uint8)
  picture = Image.fromarray(pixels)
  draw = ImageDraw.Draw(picture)
  for _ in range(6):
    corner = rng.integers((0, 0), (width, height))
    size = rng.integers(8, (width // 4 + 9, height // 4 + 9))
    colour = tuple(rng.integers(0, 256, 3).tolist())
    draw.ellipse([*corner.tolist(), *(corner + size).tolist()], fill=colour)
  file = io.BytesIO()
  picture.save(file, "JPEG", quality=_QUALITY)
  return file.getvalue()


def write_vqa_tsv(
  path: pathlib.Path, rows: int, *, width: int, height: int
) -> int:
  """Writes a TSV file in the format of OFA for VQA.

  Args:
    path: file to write.
    rows: number of rows.
    width: of the pictures, in pixels.
    height: likewise.

  Returns:
    The median size of a picture in bytes.
  """
  photos = [photo(i, width, height) for i in range(min(rows, _PICTURES))]
  encoded = [base64.b64encode(data).decode() for data in photos]
  with path.open("w", encoding="utf-8") as file:
    for i, text in enumerate(_texts(rows)):
      file.write(f"{i}\t{i}\t{text}\t{encoded[i % len(encoded)]}\n")
  return int(np.median([len(data) for data in photos]))


def _texts(rows: int) -> Iterator[str]:
  """Yields question, answers and objects of each row."""
  rng = np.random.default_rng(0)
  for i in range(rows):
    things = [_THINGS[k] for k in rng.integers(0, len(_THINGS), 12)]
    colour = _COLOURS[int(rng.integers(0, len(_COLOURS)))]
    question = f"what color is the {things[0]} beside {things[1]} {i}?"
    yield f"{question}\t1.0|!+{colour}&&0.3|!+grey\t{'&&'.join(things)}"
