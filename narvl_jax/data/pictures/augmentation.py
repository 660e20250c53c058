"""Random augmentation of training examples, beyond the reference.

All randomness comes from the generator of the caller, so an example is a pure
function of (seed, step). Augmentation is off by default.
"""

import math
import re
import string
import unicodedata
from collections.abc import Iterator

import numpy as np

# Largest aspect ratio of a crop, relative to that of the picture.
_LOG_RATIO = math.log(4 / 3)

_OTHER_SIDE = {"left": "right", "right": "left"}
# Longest expression that is processed: decomposing a text takes time quadratic
# in a run of combining marks.
_LONGEST = 10_000
# Words are matched one by one: a pattern that may start anywhere in a word
# takes time quadratic in its length.
_WORD = re.compile(r"\w+")
_SIDES = re.compile("left|right", re.IGNORECASE)
# Words with a definite opposite: "left", "topleft", "leftmost", "lefthanded".
_SWAPPED = re.compile(
  r"(top|bottom|upper|lower|low|high|mid|middle|cent(?:er|re)|front|back|rear"
  r"|far|near)?(left|right)"
  r"(?:most|hand|handed|hander|handers|side|sided|er|ie|y|s|wards?)?",
  re.IGNORECASE,
)
# Words that do not name a side, such as "bright", "upright" and "leftover".
_OTHER_WORD = re.compile(
  r"bright\w*|(?:af|stage)?fright(?:s|en|ens|ened|ening|eningly|ful|fully)?"
  r"|(?:play|ship|cart|wheel|mill|wain|boat|ark|song|plow|plough)?wrights?"
  r"|(?:up|out|down|forth|birth|copy|al)right(?:s|ly|ness|ed|er)?"
  r"|righteous\w*|rightly|rightful\w*|leftovers?|clefts?",
  re.IGNORECASE,
)
# Words that name a side without a definite opposite, or possibly no side.
# Letters and digits at their ends belong to other words.
_UNSURE = re.compile(
  r"(?<![^\W\d_])(?:"
  # Abbreviations, and misspellings not in `_MISSPELT`.
  r"[lr]|[lr]h|[lr]hs|[lr][_\W]?(?:side|hand)|[tbu][lr]|l[lr]|lt|rt|rgt|rite"
  r"|(?!left\b|right\b)(?:l+e+f+t+|r+i+g+h+t+)"
  # Rotation, hours of the clock.
  r"|(?:counter|anti)?\W?clockwise|[o0]\W{0,3}c[acklo]{2,6}s?|[o0]\W{1,3}lock"
  r"|\d{1,2}\W{0,2}position"
  # Ships, maps, cars, "right side up".
  r"|port|portside|starboard|[ns]{1,2}[.-]?[ew]|[ew][ns][ew]"
  r"|(?:north|south|mid)?(?:east|west)"
  r"(?:ern|ernmost|erly|most|wards?|wardly|bound|side)?"
  r"|(?:driver|passenger)\W{0,2}s?\W{0,2}"
  r"(?:side|door|seat|window|wheel|mirror)s?|right\W?side\W?up"
  # "All right" may name a side: "the one all right".
  r"|all\W?right"
  # Other languages.
  r"|links|rechts|gauche|droite?|izquierd[ao]|derech[ao]|esquerd[ao]|direit[ao]"
  r"|sinistra|destra"
  r")(?![^\W\d_])",
  re.IGNORECASE,
)
# Times of the clock and arrows.
_UNSURE_SIGNS = re.compile(r"(?<!\d)\d{1,2}\s?:\s?\d\d(?!\d)|<[-=]|[-=]>")
# Parts of the Unicode names of arrows, hands and clock faces.
_SIGN_NAMES = re.compile(r"\b(?:LEFT|RIGHT|EAST|WEST)|CLOCK")
# English words that differ from a side by one letter.
_NEAR_WORDS = frozenset(
  [
    *("deft", "heft", "lent", "lest", "let", "lift", "loft", "reft", "weft"),
    *("eight", "fight", "hight", "light", "might", "night", "sight", "tight"),
  ]
)


def _misspelt(word: str) -> Iterator[str]:
  """Yields all words that differ from a word by one typing error."""
  for i in range(len(word) + 1):
    start, end = word[:i], word[i:]
    yield start + end[1:]
    yield start + end[1:2] + end[:1] + end[2:]
    for letter in string.ascii_lowercase:
      yield start + letter + end
      yield start + letter + end[1:]


_MISSPELT = frozenset(
  found
  for side in _OTHER_SIDE
  for found in _misspelt(side)
  # The patterns above classify words that contain a side.
  if not _SIDES.search(found) and found not in _NEAR_WORDS
)


def random_crop(
  rng: np.random.Generator, min_area: float
) -> tuple[float, float, float, float]:
  """Returns a random crop x0, y0, x1, y1 in [0, 1].

  Args:
    rng: source of all randomness.
    min_area: smallest share of the picture's area, in (0, 1]. Shares are
      uniform. Aspect ratios, relative to that of the picture, are log-uniform
      in [3/4, 4/3], narrowed to the ratios that fit into the picture.
  """
  area = rng.uniform(min_area, 1.0)
  # Beyond this ratio the crop would exceed the picture.
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
  """Returns brightness, contrast, saturation, uniform in 1 +- `strength`."""
  brightness, contrast, saturation = rng.uniform(
    1 - strength, 1 + strength, size=3
  ).tolist()
  return brightness, contrast, saturation


def swap_sides(text: str) -> str | None:
  """Returns `text` with left and right swapped, as for a mirrored picture.

  Words with a definite opposite are swapped, such as "left", "leftmost",
  "left-hand", "topright" and "midleft"; the case is kept. "Left" in another
  sense ("the cake that is left") is swapped as well.

  Returns:
    None if a word names or may name a side and has no definite opposite, such
    as "the r one", "at 3 o'clock", "the port side" or "leftish"; if the text
    has letters of other alphabets; or more than 10,000 characters.
  """
  if len(text) > _LONGEST:
    return None
  plain = _plain(text)
  if _UNSURE.search(plain) or _UNSURE_SIGNS.search(plain):
    return None
  if any(_is_unsure(x) for x in plain if not x.isascii()):
    return None
  if any(word in _MISSPELT for word in _WORD.findall(plain.lower())):
    return None
  # A side written with accents, wide letters or invisible characters.
  if len(_SIDES.findall(plain)) != len(_SIDES.findall(text)):
    return None
  words = [word for word in _WORD.findall(text) if _SIDES.search(word)]
  if not all(map(_is_known, words)):
    return None
  return _WORD.sub(_other_side, text)


def _is_known(word: str) -> bool:
  """Returns whether a word with a side in it has an opposite or needs none."""
  if _SWAPPED.fullmatch(word):
    return True
  # "Brightright" contains two.
  return bool(_OTHER_WORD.fullmatch(word)) and len(_SIDES.findall(word)) == 1


def _is_unsure(character: str) -> bool:
  """Returns whether a character is a letter, or a symbol with a direction."""
  if character.isalpha():
    return True
  name = unicodedata.name(character, "")
  is_symbol = unicodedata.category(character).startswith("S")
  return is_symbol and bool(_SIGN_NAMES.search(name))


def _plain(text: str) -> str:
  """Removes accents, invisible characters and wide letters."""
  return "".join(
    character
    for character in unicodedata.normalize("NFKD", text)
    if unicodedata.category(character) not in ("Mn", "Cf")
  )


def _other_side(word: re.Match[str]) -> str:
  """Returns a word with its side swapped; other words unchanged."""
  match = _SWAPPED.fullmatch(word.group())
  if match is None:
    return word.group()
  side = match.group(2)
  swapped = _OTHER_SIDE[side.lower()]
  # "lEFT" becomes "rIGHT".
  if side[0].isupper():
    swapped = swapped.capitalize()
  if side[1:].isupper():
    swapped = swapped[0] + swapped[1:].upper()
  start, end = match.span(2)
  return word.group()[:start] + swapped + word.group()[end:]


def draw_answer(rng: np.random.Generator, scores: dict[str, float]) -> str:
  """Draws an answer with probability proportional to its score."""
  weights = np.fromiter(scores.values(), float)
  ends = np.cumsum(weights)
  chosen = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
  return list(scores)[min(chosen, len(scores) - 1)]
