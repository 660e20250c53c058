"""Automata against the lists of answers that they represent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding import constraint
from narvl_jax.errors import UserError

EOS, CLASSES = 2, 8
ANSWERS = [(3,), (3, 4), (5, 6, 7), (3, 4, 3), (5, 6, 6), (3, 4)]


def _answers(automaton, longest: int) -> set[tuple[int, ...]]:
  """Follows the edges, one at a time."""
  edges = list(
    zip(automaton.source, automaton.token, automaton.target, strict=True)
  )
  found, walks = set(), [((), constraint.START)]
  for _ in range(longest + 1):
    found |= {said for said, state in walks if automaton.accepting[state]}
    walks = [
      ((*said, int(token)), target)
      for said, state in walks
      for source, token, target in edges
      if source == state
    ]
  return found


def test_trie_contains_its_answers():
  trie = constraint.answer_trie(ANSWERS)
  assert _answers(trie, 5) == set(ANSWERS)
  # Answers share their beginnings: 3, 34, 343, 5, 56, 567, 566.
  assert len(trie.source) == 7
  assert len(trie.accepting) == 8
  pairs = set(zip(trie.source.tolist(), trie.token.tolist(), strict=True))
  assert len(pairs) == 7
  assert all(x.dtype == np.int32 for x in trie[:3])


def test_repeated_contains_all_choices():
  free = constraint.repeated([6, 3, 6], 3)
  assert _answers(free, 5) == set(itertools.product([3, 6], repeat=3))
  # A token that is named twice is one choice.
  assert len(free.source) == 6
  ended = constraint.repeated([6, 3], 2, then=[EOS])
  assert _answers(ended, 5) == {
    (a, b, EOS) for a, b in itertools.product([3, 6], repeat=2)
  }


def test_tokens_after_every_beginning():
  trie = constraint.answer_trie(ANSWERS)
  # The second axis is one of batch alone; (7,) begins no answer.
  beginnings = [(), (3,), (3, 4), (5, 6), (5, 6, 7), (7,)]
  words = np.full((len(beginnings), 3), -1)
  for row, said in zip(words, beginnings, strict=True):
    row[: len(said)] = said

  @jax.jit
  def allowed(words):
    states = jnp.full((len(words), 1), constraint.START)
    for i in range(3):
      # No edge takes -1, so that the state remains.
      states = constraint.advance(trie, states, words[:, i : i + 1])
    masks = [
      constraint.allowed_tokens(trie, states, CLASSES, eos)
      for eos in (EOS, None)
    ]
    return states, masks

  states, (mask, without) = jax.device_get(allowed(words))
  assert mask.shape == without.shape == (len(beginnings), 1, CLASSES)
  expected = [{3, 5}, {4, EOS}, {3, EOS}, {6, 7}, {EOS}, {3, 5}]
  for row, more in zip(mask[:, 0], expected, strict=True):
    assert set(np.flatnonzero(row)) == more
  for row, more in zip(without[:, 0], expected, strict=True):
    assert set(np.flatnonzero(row)) == more - {EOS}
  assert states[-1] == constraint.START


def test_an_automaton_may_be_an_argument_of_a_program():
  trie = constraint.answer_trie(ANSWERS)
  states = jnp.arange(len(trie.accepting))

  def allowed(automaton):
    return constraint.allowed_tokens(automaton, states, CLASSES, EOS)

  np.testing.assert_array_equal(jax.jit(allowed)(trie), allowed(trie))
  edges = constraint.leaving(trie, states)
  assert edges.shape == (8, 7)
  np.testing.assert_array_equal(edges.sum(axis=0), np.ones(7))


def test_empty_constraints_are_rejected():
  with pytest.raises(UserError, match="allows no answer at all; give at least"):
    constraint.answer_trie([])
  with pytest.raises(UserError, match="answer 1 of the constraint has no tok"):
    constraint.answer_trie([[3], []])
  with pytest.raises(UserError, match="4 places for 0 tokens; both must be"):
    constraint.repeated([], 4)
  with pytest.raises(UserError, match="0 places for 1 tokens; both must be"):
    constraint.repeated([3], 0)
