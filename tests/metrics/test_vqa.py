"""The rules of VQA v2 and A-OKVQA, held against slow plain versions."""

import itertools
import re

import pytest

from narvl_jax.metrics import vqa

_MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_"]
_MARKS += ["-", ">", "<", "@", "`", ",", "?", "!"]
_DIGITS = {
  **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3"},
  **{"four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8"},
  **{"nine": "9", "ten": "10"},
}

_TRICKY = [
  *("Yes.", "yes", "YES", " yes ", "yes!", "yes?", "yes ,", "no, thanks"),
  *("the dog", "The Dog", "a dog", "an apple", "a", "the", "", "a an the"),
  *("none", "None.", "zero", "two", "Two dogs", "ten", "eleven", "twenty one"),
  *("3.5", "3.", ".5", "3. 5", "1,000", "1,000!", "1, 000", "1,000-2,000"),
  *("U.S.", "U.S.A", "e.g.", "mr. smith", "...", "a.b.c", "v1.2.3", "1.a"),
  *("x-ray", "x -ray", "x- ray", "t-shirt, red", "and/or", "black & white"),
  *("10:30", "10:30 am.", "5 o'clock", "5 oclock", "dont", "don't", "dont!"),
  *("cant", "couldnt've", "couldn'tve", "couldntve", "somebody'd", "lets"),
  *("shes", "twas", "yall'd've", "i'm", "im", "Im", "id've", "ma am"),
  *("dog's", "dogs'", "'dog'", '"dog"', "(dog)", "[dog] ", "dog\tcat"),
  *("dog\ncat", "dog\n", "café", "naïve!", "日本", "50%", "$5.00", "#1"),
  *("a_b", "a=b", "a+b", "<b>", "me@x.com", "\\", "`", "x" * 40 + "."),
  *("." * 40, "a." * 40, "1.2." * 20),
]


def _plain(answer: str) -> str:
  """The published rule, step by step."""
  text = answer
  for mark in _MARKS:
    spaced = mark + " " in answer or " " + mark in answer
    if spaced or re.search(r"(\d)(,)(\d)", answer):
      text = text.replace(mark, "")
    else:
      text = text.replace(mark, " ")
  for _ in range(32):
    text = re.sub(r"(?!<=\d)(\.)(?!\d)", "\0", text, count=1)
  words = []
  for word in text.replace("\0", "").lower().split():
    word = _DIGITS.get(word, word)
    if word not in ("a", "an", "the"):
      words.append(word)
  return " ".join(words)


def _with_apostrophes(text: str) -> str:
  """Contractions among the tricky answers, read off the published list."""
  known = {
    **{"dont": "don't", "cant": "can't", "oclock": "o'clock"},
    **{"couldnt've": "couldn't've", "couldn'tve": "couldn't've"},
    **{"somebody'd": "somebodyd", "twas": "'twas"},
    "yall'd've": "y'all'd've",
  }
  return " ".join(known.get(word, word) for word in text.split(" "))


def _plain_accuracy(answer: str, people: list[str]) -> float:
  """Mean over all sets of nine people."""
  tidy = [
    x.replace("\n", " ").replace("\t", " ").strip() for x in (answer, *people)
  ]
  if len(set(tidy[1:])) > 1:
    tidy = [_with_apostrophes(_plain(x)) for x in tidy]
  answer, *people = tidy
  scores = [
    min(1, sum(x == answer for x in others) / 3)
    for others in itertools.combinations(people, len(people) - 1)
  ]
  return sum(scores) / len(scores)


def test_there_are_enough_tricky_answers():
  assert len(set(_TRICKY)) >= 80


@pytest.mark.parametrize("answer", _TRICKY, ids=repr)
def test_tricky_answers(answer):
  assert vqa.normalize(answer) == _with_apostrophes(_plain(answer))
  for matches in (0, 1, 2, 3, 4, 9, 10):
    people = [answer] * matches + ["other"] * (10 - matches)
    for given in (answer, answer.upper(), f"the {answer}", f"{answer}!"):
      assert vqa.vqa_v2_accuracy(given, people) == pytest.approx(
        _plain_accuracy(given, people), abs=1e-12
      )


@pytest.mark.parametrize(
  ("matches", "accuracy"),
  [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_matches_out_of_ten(matches, accuracy):
  people = ["cat"] * matches + [f"dog {i}" for i in range(10 - matches)]
  assert vqa.vqa_v2_accuracy("cat", people) == pytest.approx(accuracy)


def test_nothing_is_normalized_where_all_agree():
  assert vqa.vqa_v2_accuracy("yes.", ["yes"] * 10) == 0
  assert vqa.vqa_v2_accuracy("yes\n", ["yes"] * 10) == 1
  assert vqa.vqa_v2_accuracy("yes.", ["yes"] * 9 + ["no"]) == 1


def test_few_people():
  assert vqa.vqa_v2_accuracy("yes", ["yes"]) == 1
  assert vqa.vqa_v2_accuracy("yes", ["no"]) == 0
  assert vqa.vqa_v2_accuracy("yes", ["yes", "yes"]) == 1
  assert vqa.vqa_v2_accuracy("yes", ["yes", "no"]) == pytest.approx(0.5)


def test_a_okvqa_counts_all_people():
  people = ["cat"] * 2 + ["dog"] * 8
  assert vqa.a_okvqa_accuracy("cat", people) == pytest.approx(2 / 3)
  assert vqa.a_okvqa_accuracy("Cat", people) == 0
  assert vqa.a_okvqa_accuracy("dog", people) == 1
