"""Accuracy of answers to questions by the rules of VQA v2 and its successors.

The rule of VQA v2 (Antol et al. 2015, Goyal et al. 2017): ten people answered
each question. An answer scores min(matches / 3, 1) against each set of nine of
them, and its accuracy is the mean over the ten sets: three matches of ten give
0.9. Texts pass a normaliser before they are compared. Its quirks move
published figures, so they are kept:

- Nothing is normalised if all people gave the same text. "Yes." is wrong where
  all of them said "yes".
- A punctuation mark becomes a space. It is deleted instead if it touches a
  space somewhere in the text, or if the text has a comma between digits.
- A period is deleted unless a digit follows it: "3.5" stays, "3." becomes "3".
  Only the first 32 periods are deleted.
- "none" becomes "0".
- Apostrophes and colons stay, and only some contractions get their apostrophe.
"""

import re
from collections.abc import Callable, Mapping, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The official program passes re.UNICODE, which is 32, as the count.
_MOST_PERIODS = 32
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
  **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"},
  **{"four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
  **{"nine": "9", "ten": "10"},
}
# Contractions that are restored when exactly one apostrophe is missing.
_CONTRACTIONS = re.findall(
  r"\S+",
  """
  'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't
  don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
  isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
  needn't not've o'clock oughtn't shan't she'd've should've shouldn't
  shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
  someone'll someone's something'd something'd've something'll that's there'd
  there'd've there're there's they'd they'd've they'll they're they've wasn't
  we'd've we've weren't what'll what're what's what've when's where'd where's
  where've who'd who'd've who'll who's who've why'll why're why's won't would've
  wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
  you've
""",
)
# This one is the other way round in the official list.
_RESTORED = {"somebody'd": "somebodyd"} | {
  word[:i] + word[i + 1 :]: word
  for word in _CONTRACTIONS
  for i, character in enumerate(word)
  if character == "'"
}
# So many matches give the full score.
_ENOUGH = 3


def normalize(answer: str) -> str:
  """Returns an answer as the official normaliser of VQA v2 leaves it."""
  text = answer
  comma = _COMMA_IN_NUMBER.search(answer) is not None
  for mark in _PUNCTUATION:
    touches_space = f"{mark} " in answer or f" {mark}" in answer
    text = text.replace(mark, "" if comma or touches_space else " ")
  text = _PERIOD.sub("", text, count=_MOST_PERIODS)
  words = (_NUMBERS.get(word, word) for word in text.lower().split())
  kept = (word for word in words if word not in _ARTICLES)
  return " ".join(_RESTORED.get(word, word) for word in kept)


def vqa_v2_accuracy(answer: str, people: Sequence[str]) -> float:
  """Returns the accuracy of an answer by the rule of VQA v2, in [0, 1].

  OK-VQA uses the same rule, on ten answers of which every two are equal.

  Args:
    answer: the predicted one.
    people: one answer of each annotator, ten in the official data. With fewer
      than four annotators, agreement with all the others gives the full score.
  """
  answer, *given = (
    text.replace("\n", " ").replace("\t", " ").strip()
    for text in (answer, *people)
  )
  if len(set(given)) > 1:
    answer, given = normalize(answer), [normalize(text) for text in given]
  matches = sum(text == answer for text in given)
  needed = min(_ENOUGH, len(given) - 1)
  if needed < 1:
    return float(matches > 0)
  # The sets without one of the matching people, and the others.
  total = matches * min(matches - 1, needed)
  total += (len(given) - matches) * min(matches, needed)
  return total / (len(given) * needed)


def a_okvqa_accuracy(answer: str, people: Sequence[str]) -> float:
  """Returns the accuracy of a direct answer by the rule of A-OKVQA, in [0, 1].

  Texts are compared as they are and no annotator is left out (Schwenk et al.
  2022). The official figure skips questions with `difficult_direct_answer`.
  """
  return min(1.0, sum(text == answer for text in people) / _ENOUGH)


# Setting -> rule.
RULES: Mapping[str, Callable[[str, Sequence[str]], float]] = {
  "vqa_v2": vqa_v2_accuracy,
  "ok_vqa": vqa_v2_accuracy,
  "a_okvqa": a_okvqa_accuracy,
}
