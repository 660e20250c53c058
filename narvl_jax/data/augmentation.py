"""Random changes of training examples, beyond the reference; off by default.

Every number comes from the generator that the caller passes, so an example
stays a pure function of (seed, step).
"""

import math
import re

import numpy as np

# Of a crop's sides, relative to those of the picture.
_LOG_RATIO = math.log(4 / 3)

_OTHER_SIDE = {"left": "right", "right": "left"}
# Whole words, also joined to a place or an ending: "topleft", "leftmost".
_SIDE = re.compile(
  r"\b(top|bottom|upper|lower|far)?(left|right)"
  r"(?=(?:most|hand|side|er|ie|y|s|wards?)?\b)",
  re.IGNORECASE,
)
# These turn with the picture too, but have no certain opposite.
_UNSURE = re.compile(
  r"\b(?:l|r|lft|rt|rgt|lhs|rhs|(?:counter|anti)?clockwise|o'?\s?clock)\b",
  re.IGNORECASE,
)


def random_crop(
  rng: np.random.Generator, min_area: float
) -> tuple[float, float, float, float]:
  """Returns a random part of a picture: x0, y0, x1, y1 in [0, 1].

  Args:
    rng: source of all randomness.
    min_area: smallest share of the picture's area in (0, 1]; shares are
      uniform, ratios of the sides log-uniform between 3/4 and 4/3 of the
      picture's own as far as the part fits into it.
  """
  area = rng.uniform(min_area, 1.0)
  # Wider than this, or narrower, the part would stick out.
  limit = min(_LOG_RATIO, abs(math.log(area)))
  ratio = math.exp(rng.uniform(-limit, limit))
  width = min(math.sqrt(area * ratio), 1.0)
  height = min(math.sqrt(area / ratio), 1.0)
  x0 = rng.uniform(0.0, 1.0 - width)
  y0 = rng.uniform(0.0, 1.0 - height)
  return x0, y0, min(x0 + width, 1.0), min(y0 + height, 1.0)


def color_factors(
  rng: np.random.Generator, strength: float
) -> tuple[float, float, float]:
  """Returns factors of brightness, contrast and saturation.

  Args:
    rng: source of all randomness.
    strength: in [0, 1]; factors are uniform in [1 - strength, 1 + strength].
  """
  brightness, contrast, saturation = rng.uniform(
    1 - strength, 1 + strength, size=3
  ).tolist()
  return brightness, contrast, saturation


def swap_sides(text: str) -> str | None:
  """Returns `text` with left and right swapped, as for a mirrored picture.

  Whole words only, also "leftmost", "left-hand" or "topright"; the case is
  kept. "Left" in another sense ("the cake that is left") is swapped too.

  Returns:
    None if the text names sides in a way that cannot be turned round for
    certain, such as "the r one" or "at 3 o'clock".
  """
  if _UNSURE.search(text):
    return None

  def other(match: re.Match[str]) -> str:
    place, side = match.group(1) or "", match.group(2)
    swapped = _OTHER_SIDE[side.lower()]
    if side.isupper():
      swapped = swapped.upper()
    elif side[0].isupper():
      swapped = swapped.capitalize()
    return place + swapped

  return _SIDE.sub(other, text)


def draw_answer(rng: np.random.Generator, scores: dict[str, float]) -> str:
  """Returns an answer, drawn in proportion to its score.

  Args:
    rng: source of all randomness.
    scores: answer -> score above 0; not empty.
  """
  weights = np.fromiter(scores.values(), float)
  ends = np.cumsum(weights)
  chosen = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
  return list(scores)[min(chosen, len(scores) - 1)]
