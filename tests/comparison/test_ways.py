"""Which ways to decode a task has."""

import pytest

from narvl_jax.comparison.ways import BASELINE, DEEP, choose, ways_of
from narvl_jax.data.tasks import AnswerSpace
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError

LIST = AnswerSpace(sequences=((5,), (6, 7)))
BOX = AnswerSpace(tokens=(8, 9), count=4)
CAPTION = Decoding("beam", min_length=1, max_length=16, no_repeat_ngram=3)
CANDIDATES = Decoding("candidates", constrained=True)


def test_free_texts_have_no_constraint() -> None:
  ways = ways_of(None, "any text", CAPTION, beam_size=3)
  applicable = {way.label: way.decoding for way in ways if way.decoding}
  assert list(applicable) == [
    "AR greedy",
    "AR beam 3",
    BASELINE,
    "NAR beam 3",
  ]
  official = applicable["AR beam 3"]
  assert (official.max_length, official.no_repeat_ngram) == (16, 3)
  assert official.beam_size == 3
  assert {way.reason for way in ways if not way.decoding} == {"any text"}


def test_closed_sets_have_all_ways_and_constrained_searches() -> None:
  ways = ways_of(LIST, "", CANDIDATES, beam_size=5, uncached=True)
  found = {way.label: way.decoding for way in ways}
  assert len(found) == 8
  more = ways_of(LIST, "", CANDIDATES, beam_size=5, deep=True)
  assert [w.label for w in more if w.model == DEEP] == [
    "AR deep greedy",
    "AR deep beam 5",
  ]
  assert all(found.values())
  beam = found["AR beam 5"]
  assert beam is not None
  # As the official code ranks beams where it has a list.
  assert (beam.constrained, beam.normalize) == (True, False)


def test_boxes_are_constrained_but_not_listed() -> None:
  ways = {way.label: way for way in ways_of(BOX, "", CAPTION, beam_size=5)}
  assert ways["NAR constrained"].decoding == Decoding(constrained=True)
  for model in ("AR", "NAR"):
    way = ways[f"{model} candidates"]
    assert way.decoding is None
    assert way.reason == "there is no list of the answers"


def test_chosen_ways_include_the_baseline() -> None:
  ways = ways_of(LIST, "", CANDIDATES, beam_size=5)
  chosen = [way.label for way in choose(ways, ["ar-beam", "AR greedy"])]
  assert chosen == ["AR greedy", "AR beam 5", BASELINE]
  assert choose(ways, []) == ways
  with pytest.raises(UserError, match=r'"ar-bean".* Did you mean "ar-beam-5"'):
    choose(ways, ["ar-bean"])
