"""Drawings of predictions: a grid for a split, an overlay for one box."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from narvl_jax.data.example import Box
from narvl_jax.terminal.text import escape

Colour = tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
# Lines of text with their colours.
Lines = list[tuple[str, Colour]]


@dataclasses.dataclass(frozen=True)
class Words:
  """Labels of the two answers and their boxes."""

  prediction: str = "prediction"
  target: str = "target"
  predicted_box: str = "predicted box"
  target_box: str = "true box"


_WORDS = Words()

# Distinguishable with any colour vision, and by the line style.
PREDICTION_COLOUR: Colour = (214, 69, 0)
TARGET_COLOUR: Colour = (0, 98, 204)
_TEXT: Colour = (32, 33, 36)
_FAINT: Colour = (110, 114, 120)
_RIGHT: Colour = (16, 122, 62)
_WRONG: Colour = (190, 30, 45)
_PAPER: Colour = (255, 255, 255)
_CELL: Colour = (244, 245, 247)

_PICTURE = 256
_MARGIN = 12
_FONT_SIZE = 14
_LINE = 18
_MAX_LINES = 6
# More characters than `_MAX_LINES` can have.
_MAX_TEXT = 2000
# A coordinate beyond any picture.
_FAR = 10_000.0
_OVERLAY_MIN = 512
_OVERLAY_MAX = 1600
_OVERLAY_MIN_WIDTH = 320


@dataclasses.dataclass(frozen=True)
class Panel:
  """One cell of the grid.

  Attributes:
    image: uint8 [H, W, 3].
    title: first line, such as "vqa / count #17".
    target: truth as text; None if unknown.
    correct: shown as a word and a colour; None shows neither.
    predicted_box: predicted box in pixels of `image`.
    target_box: target box in pixels of `image`.
  """

  image: np.ndarray
  title: str
  prompt: str
  prediction: str
  target: str | None = None
  correct: bool | None = None
  predicted_box: Box | None = None
  target_box: Box | None = None


def wrap(text: str, font: Font, width: float) -> list[str]:
  """Breaks a text into lines of at most `width` pixels.

  Words wider than a line are broken; a text of more than six lines ends in an
  ellipsis.
  """
  lines = [""]
  for word in escape(text[:_MAX_TEXT], keep="\t\n").split():
    candidate = f"{lines[-1]} {word}".strip()
    if font.getlength(candidate) <= width:
      lines[-1] = candidate
      continue
    if lines[-1]:
      lines.append("")
    for letter in word:
      if lines[-1] and font.getlength(lines[-1] + letter) > width:
        lines.append("")
      lines[-1] += letter
  if len(lines) > _MAX_LINES:
    last = lines[_MAX_LINES - 1]
    while last and font.getlength(last + "...") > width:
      last = last[:-1]
    lines = [*lines[: _MAX_LINES - 1], last + "..."]
  return lines


def prediction_grid(
  panels: Sequence[Panel],
  *,
  title: str,
  note: str = "",
  columns: int = 5,
  words: Words = _WORDS,
) -> Image.Image:
  """Draws (RGB) panels below a title, and a legend if there are boxes.

  Args:
    panels: cells in reading order, at least one.
  """
  font = ImageFont.load_default(_FONT_SIZE)
  columns = min(columns, len(panels))
  texts = [_panel_lines(panel, font, words) for panel in panels]
  rows = range(0, len(panels), columns)
  heights = [
    _PICTURE + _LINE * max(map(len, texts[row : row + columns])) + _MARGIN
    for row in rows
  ]
  cell_width = _PICTURE + _MARGIN
  width = max(columns * cell_width + _MARGIN, 2 * cell_width)
  head = _wrapped([(title, _TEXT), (note, _FAINT)], font, width - 2 * _MARGIN)
  # The legend is a line of its own.
  has_boxes = any(panel.predicted_box or panel.target_box for panel in panels)
  y = _MARGIN + (len(head) + has_boxes) * _LINE + _MARGIN
  height = y + sum(heights) + _MARGIN * len(heights)
  canvas = Image.new("RGB", (width, height), _PAPER)
  draw = ImageDraw.Draw(canvas)
  legend_y = _draw_lines(draw, (_MARGIN, _MARGIN), head, font)
  if has_boxes:
    _draw_legend(draw, (_MARGIN, legend_y), font, words=words)
  for row, height in zip(rows, heights, strict=True):
    for column, panel in enumerate(panels[row : row + columns]):
      x = _MARGIN + column * cell_width
      draw.rectangle((x, y, x + _PICTURE, y + height), fill=_CELL)
      _paste_picture(canvas, panel, (x, y))
      place = (x + 4, y + _PICTURE + 4)
      _draw_lines(draw, place, texts[row + column], font)
    y += height + _MARGIN
  return canvas


def box_overlay(
  image: np.ndarray,
  predicted_box: Box | None,
  *,
  target_box: Box | None = None,
  caption: str = "",
) -> Image.Image:
  """Draws (RGB) a predicted box, and the true one if known, into a picture.

  Small pictures are enlarged and huge ones reduced to a size for viewing.

  Args:
    image: uint8 [H, W, 3].
    predicted_box: in pixels of `image`.
    target_box: in pixels of `image`.
  """
  font = ImageFont.load_default(_FONT_SIZE)
  picture = Image.fromarray(image)
  long_side = max(picture.size)
  if long_side < _OVERLAY_MIN or long_side > _OVERLAY_MAX:
    limit = _OVERLAY_MIN if long_side < _OVERLAY_MIN else _OVERLAY_MAX
    picture = _fit(picture, limit)
  width = max(picture.width, _OVERLAY_MIN_WIDTH)
  lines = _wrapped([(caption, _TEXT)], font, width - 2 * _MARGIN)
  height = picture.height + _LINE * (len(lines) + 1) + 2 * _MARGIN
  canvas = Image.new("RGB", (width, height), _PAPER)
  canvas.paste(picture, (0, 0))
  draw = ImageDraw.Draw(canvas)
  scale = picture.width / image.shape[1], picture.height / image.shape[0]
  _draw_boxes(draw, (0, 0), scale, predicted_box, target_box)
  y = _draw_lines(draw, (_MARGIN, picture.height + _MARGIN), lines, font)
  _draw_legend(draw, (_MARGIN, y), font, with_target=target_box is not None)
  return canvas


def _wrapped(parts: Lines, font: Font, width: float) -> Lines:
  return [
    (line, colour)
    for text, colour in parts
    if text
    for line in wrap(text, font, width)
  ]


def _draw_lines(
  draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Lines, font: Font
) -> int:
  """Writes lines below one another and returns the y after them."""
  x, y = place
  for line, colour in lines:
    draw.text((x, y), line, font=font, fill=colour)
    y += _LINE
  return y


def _panel_lines(panel: Panel, font: Font, words: Words) -> Lines:
  """Returns the lines below the picture."""
  title, verdict = panel.title, _TEXT
  if panel.correct is not None:
    # A word as well, for readers who cannot see the colours.
    title += ": right" if panel.correct else ": wrong"
    verdict = _RIGHT if panel.correct else _WRONG
  parts = [
    (title, _FAINT),
    (panel.prompt, _TEXT),
    (f"{words.prediction}: {panel.prediction}", verdict),
  ]
  if panel.target is not None:
    parts.append((f"{words.target}: {panel.target}", TARGET_COLOUR))
  return _wrapped(parts, font, _PICTURE - 8)


def _fit(picture: Image.Image, side: int) -> Image.Image:
  """Scales the long side of a picture to about `side` pixels.

  Small pictures are enlarged by an integer, so that their pixels stay square.
  """
  factor = side / max(picture.size)
  if factor >= 2:
    factor = int(factor)
  width, height = (max(1, round(x * factor)) for x in picture.size)
  sampling = (
    Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
  )
  return picture.resize((width, height), sampling)


def _paste_picture(
  canvas: Image.Image, panel: Panel, origin: tuple[int, int]
) -> None:
  """Draws the picture of a panel, centred in its square, and its boxes."""
  picture = _fit(Image.fromarray(panel.image), _PICTURE)
  left = origin[0] + (_PICTURE - picture.width) // 2
  top = origin[1] + (_PICTURE - picture.height) // 2
  canvas.paste(picture, (left, top))
  height, width = panel.image.shape[:2]
  scale = picture.width / width, picture.height / height
  _draw_boxes(
    ImageDraw.Draw(canvas),
    (left, top),
    scale,
    panel.predicted_box,
    panel.target_box,
  )


def _draw_boxes(
  draw: ImageDraw.ImageDraw,
  origin: tuple[int, int],
  scale: tuple[float, float],
  predicted_box: Box | None,
  target_box: Box | None,
) -> None:
  """Draws the target dashed and the prediction solid, both on white."""
  for box, colour, dashed in (
    (target_box, TARGET_COLOUR, True),
    (predicted_box, PREDICTION_COLOUR, False),
  ):
    if box is None:
      continue
    # Clipped, because the time to draw a line grows with its length.
    xs = sorted(_near(origin[0] + x * scale[0]) for x in (box[0], box[2]))
    ys = sorted(_near(origin[1] + y * scale[1]) for y in (box[1], box[3]))
    corners = (xs[0], ys[0], xs[1], ys[1])
    _rectangle(draw, corners, _PAPER, 5)
    _rectangle(draw, corners, colour, 3, dashed=dashed)


def _near(position: float) -> float:
  return min(max(position, -_FAR), _FAR)


def _rectangle(
  draw: ImageDraw.ImageDraw,
  corners: Box,
  colour: Colour,
  width: int,
  *,
  dashed: bool = False,
) -> None:
  """Draws an outline centred on the edges of a box."""
  x0, y0, x1, y1 = corners
  for start, end in (
    ((x0, y0), (x1, y0)),
    ((x0, y1), (x1, y1)),
    ((x0, y0), (x0, y1)),
    ((x1, y0), (x1, y1)),
  ):
    length = max(end[0] - start[0], end[1] - start[1])
    dash = 8.0 if dashed else max(length, 1.0)
    position = 0.0
    while position < length or position == 0:
      stop = min(position + dash, length)
      horizontal = start[1] == end[1]
      dx, dy = (1, 0) if horizontal else (0, 1)
      draw.line(
        (
          start[0] + position * dx,
          start[1] + position * dy,
          start[0] + stop * dx,
          start[1] + stop * dy,
        ),
        fill=colour,
        width=width,
      )
      position += 2 * dash


def _draw_legend(
  draw: ImageDraw.ImageDraw,
  origin: tuple[int, int],
  font: Font,
  *,
  with_target: bool = True,
  words: Words = _WORDS,
) -> None:
  """Draws the legend of colours and line styles."""
  x, y = origin
  entries = [(words.predicted_box, PREDICTION_COLOUR, False)]
  if with_target:
    entries.append((words.target_box, TARGET_COLOUR, True))
  for text, colour, dashed in entries:
    _rectangle(draw, (x, y + 3, x + 22, y + 14), colour, 3, dashed=dashed)
    draw.text((x + 30, y), text, font=font, fill=_TEXT)
    x += 30 + int(font.getlength(text)) + 2 * _MARGIN
