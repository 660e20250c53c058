"""Texts of records: checks before tokenising, and the spelling of answers.

Targets, truths, lists of allowed answers and predictions are compared in the
spelling of `normalize_answer`, so that a predicted answer of the training data
can score. The official files have this spelling already.
"""

import collections
import unicodedata
from collections.abc import Mapping, Sequence

from narvl_jax.errors import UserError

# Longer than any prompt or answer; tokenising takes half a second.
_LONGEST_TEXT = 1_000_000
# Composing a longer answer (NFC) may take minutes: the time is quadratic in a
# run of combining marks.
LONGEST_ANSWER = 10_000
# Invisible characters without meaning: soft hyphen, zero-width space, marks of
# the direction of text, word joiner, invisible operators, byte order mark. The
# joiners U+200C and U+200D and the selector U+FE0F belong to words and emoji.
_INVISIBLE = dict.fromkeys(
  [
    *(0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2065),
    *range(0x2066, 0x2070),
  ]
)
# Number of other annotators that must agree for the full score (VQA v2).
_AGREEING = 3


def checked_text(text: str) -> str:
  """Returns the text if it can be tokenised.

  Raises:
    UserError: it contains an unpaired surrogate, which is not a character, or
      it is too long.
  """
  if len(text) > _LONGEST_TEXT:
    raise UserError(
      f"the text has {len(text):,} characters, the limit is {_LONGEST_TEXT:,}:"
      " no prompt and no answer is that long"
    )
  try:
    text.encode()
  except UnicodeEncodeError as e:
    raise UserError(
      f"the text has half of a surrogate pair, \\u{ord(text[e.start]):04x}, as"
      f" its character {e.start + 1}; no token stands for it: save the text as"
      " UTF-8 again"
    ) from e
  return text


def normalize_answer(text: str) -> str:
  """Returns an answer in the spelling in which answers are compared.

  White space at the ends is removed, runs of it become one space, invisible
  characters without meaning are removed, and characters are composed (Unicode
  NFC). Case and punctuation stay.

  A text longer than `LONGEST_ANSWER` is not composed. It cannot equal an answer
  of a record, since such a record is bad (see `record_checks`).
  """
  visible = " ".join(text.translate(_INVISIBLE).split())
  if len(visible) > LONGEST_ANSWER:
    return visible
  return unicodedata.normalize("NFC", visible)


def normalized_answers(answers: Mapping[str, float]) -> dict[str, float]:
  """Normalises the answers of answer -> score, keeping their order.

  Answers that become equal get the highest of their scores.
  """
  found: dict[str, float] = {}
  for answer, score in answers.items():
    text = normalize_answer(answer)
    found[text] = max(score, found.get(text, score))
  return found


def annotator_scores(answers: Sequence[str]) -> dict[str, float]:
  """Returns the VQA v2 score of each answer of several annotators.

  An answer scores min(matches / 3, 1) against every set of all annotators but
  one; its score is the mean over these sets. With ten annotators one match
  gives 0.3, two 0.6, three 0.9, and four or more 1. With fewer than four
  annotators all others must agree, so that a unanimous answer scores 1.

  Args:
    answers: one per annotator; an empty text stands for no answer.

  Returns:
    Normalised answer -> score in (0, 1], the most frequent first, equally
    frequent ones in the order of their first annotators.
  """
  people = len(answers)
  counts = collections.Counter(map(normalize_answer, answers))
  del counts[""]
  needed = min(_AGREEING, people - 1)
  if needed < 1:
    return dict.fromkeys(counts, 1.0)
  scores = {}
  for answer, count in counts.most_common():
    # Sets that lack one of its annotators, and the other sets.
    matches = count * min(count - 1, needed)
    matches += (people - count) * min(count, needed)
    scores[answer] = matches / (people * needed)
  return scores
