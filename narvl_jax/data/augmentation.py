"""Random changes of training examples, beyond the reference; off by default.

Every number comes from the generator that the caller passes, so an example
stays a pure function of (seed, step).
"""

import math
import re
import unicodedata

import numpy as np

# Of a crop's sides, relative to those of the picture.
_LOG_RATIO = math.log(4 / 3)

_OTHER_SIDE = {"left": "right", "right": "left"}
# A word of letters, digits and underscores that holds a side.
_SIDE_WORD = re.compile(r"\w*(?:left|right)\w*", re.IGNORECASE)
# Those with a certain opposite: "left", "topleft", "leftmost", "lefthanded".
_SWAPPED = re.compile(
  r"(top|bottom|upper|lower|mid|middle|cent(?:er|re)|front|back|rear"
  r"|far|near)?(left|right)"
  r"(?:most|hand|handed|hander|handers|side|sided|er|ie|y|s|wards?)?",
  re.IGNORECASE,
)
# Those that name no side, such as "bright", "upright" and "leftover".
_OTHER_WORD = re.compile(
  r"bright\w*|\w*fright\w*|\w*wrights?|(?:up|out|down|forth|birth|copy|al)right"
  r"(?:s|ly|ness|ed|er)?|righteous\w*|rightly|rightful\w*|leftovers?|clefts?",
  re.IGNORECASE,
)
# These turn with the picture, too, but have no certain opposite. Letters and
# digits at their ends belong to other words.
_UNSURE = re.compile(
  r"(?<![^\W\d_])(?:"
  # Abbreviations and common misspellings.
  r"[lr]|[lr]h|[lr]hs|[lr][_\W]?(?:side|hand)|[tbu][lr]|l[lr]|lft|lt|lef|leff|lfet"
  r"|elft|rt|rgt|rght|rigt|righ|rigth|rihgt|ritght|rite"
  # Directions of turning, hours of the clock.
  r"|(?:counter|anti)?\W?clockwise|o\W{0,3}clock"
  # Ships, maps, cars, and what stands upright.
  r"|port|portside|starboard|(?:north|south)?(?:east|west)(?:ern|wards?)?"
  r"|(?:driver|passenger)\W{0,2}s?\W?side|right\W?side\W?up"
  # Other languages.
  r"|links|rechts|gauche|droite?|izquierd[ao]|derech[ao]|esquerd[ao]|direit[ao]"
  r"|sinistra|destra"
  r")(?![^\W\d_])",
  re.IGNORECASE,
)
_SIDES = re.compile("left|right", re.IGNORECASE)


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

  Words with a certain opposite are swapped, such as "left", "leftmost",
  "left-hand", "topright" and "midleft"; the case is kept. "Left" in another
  sense ("the cake that is left") is swapped, too.

  Returns:
    None if a word names or may name a side and has no certain opposite, such
    as "the r one", "at 3 o'clock", "the port side" or "leftish"; and for
    letters of other alphabets, whose words are not known.
  """
  plain = _plain(text)
  if _UNSURE.search(plain):
    return None
  if any(x.isalpha() and not x.isascii() for x in plain):
    return None
  # A side written in other letters, or with something invisible inside.
  if len(_SIDES.findall(plain)) != len(_SIDES.findall(text)):
    return None
  words = [match.group() for match in _SIDE_WORD.finditer(text)]
  known = (_SWAPPED, _OTHER_WORD)
  if not all(any(x.fullmatch(word) for x in known) for word in words):
    return None
  return _SIDE_WORD.sub(_other_side, text)


def _plain(text: str) -> str:
  """Returns a text without accents, invisible characters and wide letters."""
  return "".join(
    character
    for character in unicodedata.normalize("NFKD", text)
    if unicodedata.category(character) not in ("Mn", "Cf")
  )


def _other_side(word: re.Match[str]) -> str:
  """Returns a word with its side swapped, if it is one of a side."""
  match = _SWAPPED.fullmatch(word.group())
  if match is None:
    return word.group()
  side = match.group(2)
  swapped = _OTHER_SIDE[side.lower()]
  if side.isupper():
    swapped = swapped.upper()
  elif side[0].isupper():
    swapped = swapped.capitalize()
  start, end = match.span(2)
  return word.group()[:start] + swapped + word.group()[end:]


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
