"""Texts of records: what can be tokenised, and the one spelling of answers.

Targets, truths, lists of allowed answers and predictions are all compared in
the spelling of `normalize_answer`, so that an answer that is trained on can
also score. The official files are in this spelling already.
"""

import collections
import unicodedata
from collections.abc import Mapping, Sequence

from narvl_jax.errors import UserError

# Far beyond any prompt or answer; tokenising as much takes half a second.
_LONGEST_TEXT = 1_000_000
# Characters of an answer; composing more of them may take minutes, as its time
# grows with the square of a run of combining marks.
LONGEST_ANSWER = 10_000
# Invisible and without meaning: soft hyphen, zero-width space, marks of the
# direction of text, word joiner, invisible operators, byte order mark. The
# joiners U+200C and U+200D and the selector U+FE0F belong to words and emoji.
_INVISIBLE = dict.fromkeys(
  [
    *(0xAD, 0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2065),
    *range(0x2066, 0x2070),
  ]
)
# So many of the other annotators must agree for the full score (VQA v2).
_AGREEING = 3


def checked_text(text: str) -> str:
  """Returns the text if it can be tokenised.

  Raises:
    UserError: it holds half of a surrogate pair, which is no character, or it
      is so long that this would take minutes.
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

  White space at the ends is removed, each run of it inside becomes one space,
  invisible characters without meaning are removed, and characters are composed
  (Unicode NFC). Case and punctuation stay.

  A text longer than `LONGEST_ANSWER` is not composed. It equals no answer of a
  record: such a record is bad (see `record_checks`).
  """
  visible = " ".join(text.translate(_INVISIBLE).split())
  if len(visible) > LONGEST_ANSWER:
    return visible
  return unicodedata.normalize("NFC", visible)


def normalized_answers(answers: Mapping[str, float]) -> dict[str, float]:
  """Returns answer -> score in that spelling, in the same order.

  Of answers that become equal the highest score counts.
  """
  found: dict[str, float] = {}
  for answer, score in answers.items():
    text = normalize_answer(answer)
    found[text] = max(score, found.get(text, score))
  return found


def annotator_scores(answers: Sequence[str]) -> dict[str, float]:
  """Returns the score of each answer that several people gave.

  The accuracy of VQA v2: an answer is held against every set of all annotators
  but one, where it scores min(matches / 3, 1), and the mean over these sets is
  its score. With ten annotators one match gives 0.3, two 0.6, three 0.9, and
  four or more 1.

  The rule is the same for any other number, except that with fewer than four
  annotators all others must agree: what everybody says has the score 1.

  Args:
    answers: one of each annotator; empty ones are of people without an answer.

  Returns:
    Normalised answer -> score in (0, 1]. The most frequent comes first; equally
    frequent ones are in the order of their first annotators.
  """
  people = len(answers)
  counts = collections.Counter(map(normalize_answer, answers))
  del counts[""]
  needed = min(_AGREEING, people - 1)
  if needed < 1:
    return dict.fromkeys(counts, 1.0)
  scores = {}
  for answer, count in counts.most_common():
    # In the sets that lack one of those who gave it, and in the others.
    matches = count * min(count - 1, needed)
    matches += (people - count) * min(count, needed)
    scores[answer] = matches / (people * needed)
  return scores
