"""A trace as one picture, and heat maps of attention."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from narvl_jax.data.pictures import rendering
from narvl_jax.inspection.trace import Query, Trace
from narvl_jax.terminal.text import brief

_INK, _FAINT, _BLANK = (32, 33, 36), (110, 114, 120), (176, 180, 186)
_PAPER, _WORD = (255, 255, 255), (205, 222, 247)
_HEAT = np.array(rendering.PREDICTION_COLOUR, np.float32)
_COLUMNS = 8
_CELL, _THUMBNAIL, _MARGIN, _LINE, _PICTURE = 124, 112, 12, 17, 224
_TOKENS = 3
_ROW = _THUMBNAIL + (_TOKENS + 2) * _LINE + 2 * _MARGIN


def thumbnail(image: np.ndarray, side: int) -> Image.Image:
  """Returns a picture whose long side has `side` pixels.

  Args:
    image: uint8 [H, W, 3].
    side: side in pixels.
  """
  height, width = image.shape[:2]
  scale = side / max(height, width)
  size = max(1, round(width * scale)), max(1, round(height * scale))
  small = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
  return Image.fromarray(image).resize(size, small)


def heat_map(
  image: np.ndarray, attention: np.ndarray, side: int = _THUMBNAIL
) -> Image.Image:
  """Returns a grey picture, coloured where the attention is.

  The token with the largest share has the full colour, even if its share is
  small.

  Args:
    image: uint8 [H, W, 3].
    attention: float32 [h, w].
    side: side of the result, in pixels.
  """
  base = thumbnail(image, side)
  grey = np.asarray(base.convert("L"), np.float32)[..., None]
  share = Image.fromarray(attention / max(float(attention.max()), 1e-12))
  weight = np.asarray(share.resize(base.size, Image.Resampling.BILINEAR))
  weight = 0.8 * np.clip(weight, 0, 1)[..., None]
  mixed = (1 - weight) * (0.5 * grey + 110) + weight * _HEAT
  return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def draw(trace: Trace, title: str) -> Image.Image:
  """Draws picture, answer and the queries, eight in a row.

  A query has its number, its heat map, its likeliest tokens, and the token of
  the answer that it emits; blanks are grey and have no heat map.
  """
  font = ImageFont.load_default(13)
  columns = min(_COLUMNS, len(trace.queries))
  width = max(columns * _CELL, _PICTURE + 360) + 2 * _MARGIN
  rows = -(-len(trace.queries) // columns)
  top = _PICTURE + 2 * _MARGIN
  canvas = Image.new("RGB", (width, top + rows * _ROW), _PAPER)
  pen = ImageDraw.Draw(canvas)
  image = trace.record.image
  assert isinstance(image, np.ndarray)
  canvas.paste(thumbnail(image, _PICTURE), (_MARGIN, _MARGIN))
  _draw_head(pen, trace, title, width - _PICTURE - 3 * _MARGIN)
  for number, query in enumerate(trace.queries):
    row, column = divmod(number, columns)
    x, y = _MARGIN + column * _CELL, top + row * _ROW
    _draw_query(canvas, pen, (x, y), number, query, font, trace)
  return canvas


def answer_text(trace: Trace) -> str:
  """Returns the answer; boxes have whole pixels."""
  if isinstance(trace.answer, str):
    return trace.answer or "(empty)"
  if not any(trace.answer):
    return "no box"
  return ", ".join(f"{x:.0f}" for x in trace.answer)


def _draw_head(
  pen: ImageDraw.ImageDraw, trace: Trace, title: str, width: int
) -> None:
  font = ImageFont.load_default(15)
  parts = [
    (title, _FAINT),
    (trace.record.prompt, _INK),
    (f"{answer_text(trace)} ({100 * trace.probability:.1f} %)", _INK),
  ]
  if trace.target_probability is not None:
    share = f"({100 * trace.target_probability:.1f} %)"
    target = f"target: {' '.join(trace.labels)} {share}"
    parts.append((target, rendering.TARGET_COLOUR))
  y = _MARGIN
  for part, colour in parts:
    for line in rendering.wrap(part, font, width) if part else ():
      pen.text((_PICTURE + 2 * _MARGIN, y), line, font=font, fill=colour)
      y += _LINE + 3


def _draw_query(
  canvas: Image.Image,
  pen: ImageDraw.ImageDraw,
  place: tuple[int, int],
  number: int,
  query: Query,
  font: rendering.Font,
  trace: Trace,
) -> None:
  x, y = place
  ink = _BLANK if query.blank else _INK
  pen.text((x, y), f"query {number}", font=font, fill=ink)
  y += _LINE
  image = trace.record.image
  assert isinstance(image, np.ndarray)
  if query.word is not None:
    canvas.paste(heat_map(image, query.attention), (x, y))
  y += _THUMBNAIL + 4
  if query.word is not None:
    before, after = _neighbours(trace, number)
    # Bars of one word touch.
    end = x + (_CELL if after == query.word else _THUMBNAIL)
    pen.rectangle((x, y, end, y + _LINE), fill=_WORD)
    if before != query.word:
      word = brief(trace.words[query.word], 15)
      pen.text((x + 4, y), word, font=font, fill=_INK)
  y += _LINE + 3
  for token, probability in query.tokens[:_TOKENS]:
    shown = f"{brief(token, 10)} {100 * probability:.0f} %"
    pen.text((x, y), shown, font=font, fill=ink)
    y += _LINE


def _neighbours(trace: Trace, number: int) -> tuple[int | None, int | None]:
  """Returns the words of the queries before and after one."""
  words = [None, *(query.word for query in trace.queries), None]
  return words[number], words[number + 2]
