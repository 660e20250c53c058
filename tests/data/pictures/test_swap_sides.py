"""Left and right swapped in expressions of mirrored pictures."""

import pytest

from narvl_jax.data.pictures import augmentation


@pytest.mark.parametrize(
  ("text", "swapped"),
  [
    ("the left dog", "the right dog"),
    ("Left of the RIGHT one, right?", "Right of the LEFT one, left?"),
    ("leftmost, rightmost", "rightmost, leftmost"),
    ("left-hand side", "right-hand side"),
    ("the lefts and the righty", "the rights and the lefty"),
    ("topleft bottomRight", "topright bottomLeft"),
    ("leftwards rightward", "rightwards leftward"),
    ("lefthand man's left", "righthand man's right"),
    # Joined words are swapped as a whole, in any case.
    ("midleft midRight", "midright midLeft"),
    ("the MIDDLELEFT one, centerright", "the MIDDLERIGHT one, centerleft"),
    ("lefthanded batter, LeftHander", "righthanded batter, RightHander"),
    ("left-handed left-sided", "right-handed right-sided"),
    ("man\u2019s left, the dog's Right", "man\u2019s right, the dog's Left"),
    ("dög on the left", "dög on the right"),
    ("dog2 left, left/top", "dog2 right, right/top"),
    ("the lowright one, HIGHLEFT", "the lowleft one, HIGHRIGHT"),
    ("lEFT dog", "rIGHT dog"),
    # Near in spelling, but of another meaning.
    (
      "eight lights, a left sight at night",
      "eight lights, a right sight at night",
    ),
    (
      "let us lift the left loft; \u00a9 left",
      "let us lift the right loft; \u00a9 right",
    ),
    ("easter egg left, Portland, 10:5", "easter egg right, Portland, 10:5"),
    # Other words that contain these letters.
    ("brightly frightened playwrights, alright, copyrighted", None),
    ("downright forthright, clefts, LEFTOVERS, Upright", None),
    ("bright upright leftover cleft rightly", None),
    ("stagefright, Arkwright, the shipwright's brightest", None),
    ("", None),
    ("a dog", None),
  ],
)
def test_swap_sides(text: str, swapped: str | None) -> None:
  expected = text if swapped is None else swapped
  assert augmentation.swap_sides(text) == expected
  # Twice mirrored is the picture again.
  assert augmentation.swap_sides(expected) == text


@pytest.mark.parametrize(
  "text",
  [
    *("the r one", "lft dog", "at 3 o'clock", "RHS left", "6 oclock"),
    # Clocks, with every apostrophe that people type.
    *(
      "10 o\u2019clock",
      "10 o`clock",
      "10 O\u2032CLOCK",
      "10o\u02bcclock",
      "3 o clock",
    ),
    *("10 o' clock", "counter-clockwise", "anti clockwise", "10o'clock"),
    # Words that contain a side and are not known.
    *("leftish", "rightfield", "leftt dog", "left2", "left_dog", "nonleft"),
    # Abbreviations, misspellings, ships, maps, cars.
    *(
      "tl corner",
      "guy on R",
      "3rd from l.",
      "l-side",
      "rigth dog",
      "rt",
      "lt",
    ),
    *("port side", "Starboard bow", "the east one", "southwest corner"),
    *("driver\u2019s side", "passenger side", "right side up"),
    # The same words in other letters, or with something invisible inside.
    *(
      "\uff4c\uff45\uff46\uff54 dog",
      "le\u200bft dog",
      "ri\u00adght",
      "l\u0435ft dog",
    ),
    *("links vom Baum", "à gauche", "a la izquierda", "左边的狗"),
    # Words that end as trades do, or begin as "bright", but hold a side.
    *("dogwright", "rowright", "halfright", "brightright", "outleft"),
    # Maps.
    *("westside", "eastside house", "westernmost", "Easternmost", "westerly"),
    *("easterly", "westbound bus", "eastbound", "northeasterly", "midwest"),
    *("NW corner", "the NE one", "SW", "SE.", "N.W. corner", "n.e", "S-E"),
    *("ENE", "SSW of it"),
    # Signs.
    *("\u2190 dog", "dog \u2192", "\u2b05", "\u2b05\ufe0f dog", "\u27a1 dog"),
    *("\U0001f448 this", "that \U0001f449", "\u25c0 one", "\u21d2", "\u2196"),
    *("<- dog", "the one ->", "=> dog", "<--", "\U0001f558 dog"),
    # Clocks.
    *("9:00 position", "dog at 3 : 30", "9 position", "at 3 0'clock"),
    *("3 o'clok", "3 o'clocks", "3 o'colck", "3 o'lock", "3 oclcok"),
    # Misspelt, at any letter.
    *("lefft", "rigght", "leeft dog", "riight", "lfet", "elft", "rihgt"),
    *("ritght", "roght dog", "kefr left lefr", "tight rught", "RIHGT dog"),
    # Cars.
    *(
      "driver's door",
      "drivers' side",
      "passenger door",
      "driver\u2019s window",
    ),
    # Names a side or none.
    *("all right", "All-right then", "allright"),
  ],
)
def test_swap_sides_gives_up(text: str) -> None:
  assert augmentation.swap_sides(text) is None


def test_every_mistake_in_one_letter_gives_up() -> None:
  for word in ("left", "right"):
    for i in range(len(word)):
      for typo in (
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + "q" + word[i + 1 :],
        word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :],
      ):
        if typo not in (word, "let"):
          assert augmentation.swap_sides(f"the {typo} dog") is None, typo


def test_long_expressions_do_not_change() -> None:
  """Without limits each would take time quadratic in its length."""
  for text in ("x" * 300_000, "a" + "\u0300\u0323" * 500_000, "left" * 75_000):
    assert augmentation.swap_sides(text) is None
  text = "x " * 4_990
  assert augmentation.swap_sides(text + "left") == text + "right"


@pytest.mark.parametrize("filler", ["x", "right", "_", "o", "1"])
def test_time_of_a_long_word_is_linear(
  filler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(augmentation, "_LONGEST", 10**7)
  text = filler * (1_000_000 // len(filler))
  # Ends at all: with the square of the length this is a matter of hours.
  assert augmentation.swap_sides(text) in (text, None)
