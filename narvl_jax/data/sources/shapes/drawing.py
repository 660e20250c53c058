"""Draws a scene by blending anti-aliased masks into a background.

A mask is made once, by supersampling, for each shape, side and quarter-pixel
phase.
"""

import functools

import numpy as np

from narvl_jax.data.sources.shapes import words
from narvl_jax.data.sources.shapes.scene import Scene, SceneObject

_SHADES = 16
_TILES = 16
_OFFSETS = 32
_GREY = (128.0, 128.0, 128.0)


def render(scene: Scene, size: int) -> np.ndarray:
  """Draws a scene: uint8 [size, size, 3]."""
  tile, row, column, level = scene.background
  canvas = _tiles(size)[tile][row : row + size, 3 * column :][:, : 3 * size]
  canvas = canvas + _brightness(level)
  for item in scene.objects:
    _blend(canvas, item)
  if scene.screen is not None:
    _blend(canvas, scene.screen)
  return canvas.astype(np.uint8).reshape(size, size, 3)


def _blend(canvas: np.ndarray, item: SceneObject) -> None:
  x, y = int(item.x), int(item.y)
  phase = int(4 * (item.x - x)), int(4 * (item.y - y))
  keep, paint, ink = _mask(item.shape, item.texture, item.side, *phase)
  # Layouts keep a margin, so the window lies in the picture.
  height, width = keep.shape
  part = canvas[y : y + height, 3 * x : 3 * x + width]
  np.multiply(part, keep, out=part)
  part += paint * _rows(width)[_shade(item)]
  if ink is not None:
    part += ink


def _brightness(level: int) -> float:
  # Sixteen dark and sixteen light greys.
  return 24.0 + 3 * level if level < 16 else 188.0 + 3 * (level - 16)


def _shade(item: SceneObject) -> int:
  if item.shape == "screen":
    return len(words.COLORS) * _SHADES
  return words.COLORS.index(item.color) * _SHADES + item.variant


@functools.cache
def _rows(width: int) -> np.ndarray:
  """Returns every shade repeated along a row: float32 [shades, width]."""
  jitter = np.random.RandomState(1).uniform(-18, 18, (6, _SHADES, 3))
  base = np.asarray([words.RGB[color] for color in words.COLORS])
  shades = np.clip(base[:, None] + jitter, 8, 247).reshape(-1, 3)
  shades = np.concatenate([shades, [_GREY]])
  return np.tile(shades, (1, width // 3)).astype(np.float32)


@functools.cache
def _tiles(size: int) -> np.ndarray:
  """Returns grey noise around 0: float32 [tiles, size + 32, 3 (size + 32)]."""
  random = np.random.RandomState(0)
  side = size + _OFFSETS
  fine = random.uniform(-7, 7, (_TILES, side, side))
  ramp = np.linspace(-1, 1, side)
  slope = random.uniform(-8, 8, (2, _TILES, 1, 1))
  noise = fine + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
  return np.repeat(noise, 3, axis=2).astype(np.float32)


@functools.cache
def _mask(
  shape: str, texture: str, side: int, phase_x: int, phase_y: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Returns the masks of an object in its window of side + 1 pixels.

  Each is float32 [side + 1, 3 (side + 1)]: the share of the background, the
  share of the object's colour, and white to add (or None).
  """
  steps = 8 if side <= 40 else 4
  grid = (np.arange((side + 1) * steps) + 0.5) / steps
  u = ((grid - phase_x / 4) / side)[None, :]
  v = ((grid - phase_y / 4) / side)[:, None]
  fine = _inside(shape, u, v)

  def pixels(image: np.ndarray) -> np.ndarray:
    image = image.reshape(side + 1, steps, side + 1, steps)
    mean = image.mean(axis=(1, 3), dtype=np.float64)
    return np.repeat(mean, 3, axis=1).astype(np.float32)

  alpha = pixels(fine)
  if shape == "screen":
    frame = np.minimum(np.minimum(u, 1 - u), np.minimum(v, 1 - v)) < 0.08
    return 1 - alpha, alpha - 0.4 * pixels(fine & frame), None
  if texture == "striped":  # three bars of a darker shade
    bars = np.abs(v * 3 % 1 - 0.5) < 0.25
    return 1 - alpha, alpha - 0.65 * pixels(fine & bars), None
  if texture == "dotted":  # three rows of three dots of a lighter shade
    dots = (np.abs(u * 3 % 1 - 0.5) < 0.27) & (np.abs(v * 3 % 1 - 0.5) < 0.27)
    ink = 0.75 * pixels(fine & dots)
    return 1 - alpha, alpha - ink, 250 * ink
  return 1 - alpha, alpha, None


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Returns which points of the unit square [v, u] belong to the shape."""
  unit = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
  a, b = 2 * u - 1, 2 * v - 1
  if shape == "circle":
    return a**2 + b**2 <= 1
  if shape == "diamond":
    return np.abs(a) + np.abs(b) <= 1
  if shape == "triangle":
    return unit & (np.abs(a) <= v)
  if shape == "cross":
    arm = 0.3
    return unit & ((np.abs(a) <= arm) | (np.abs(b) <= arm))
  if shape == "star":
    return unit & _star(u, v)
  return unit  # square and screen


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Returns a five-pointed star that touches all four edges."""
  corners = np.arange(10) * np.pi / 5
  radius = np.where(np.arange(10) % 2, 0.42, 1.0)
  px, py = radius * np.sin(corners), -radius * np.cos(corners)
  px = (px - px.min()) / (px.max() - px.min())
  py = (py - py.min()) / (py.max() - py.min())
  inside = np.zeros(np.broadcast_shapes(u.shape, v.shape), bool)
  for i in range(10):
    x0, y0, x1, y1 = px[i - 1], py[i - 1], px[i], py[i]
    if y0 == y1:
      continue
    crosses = (y0 > v) != (y1 > v)
    inside ^= crosses & (u < x0 + (v - y0) * (x1 - x0) / (y1 - y0))
  return inside
