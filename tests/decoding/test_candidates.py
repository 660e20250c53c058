"""Scores of closed sets against one answer at a time, and beam search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.beam_search import beam_search
from narvl_jax.decoding.candidates import score_candidates
from narvl_jax.decoding.constraint import alphabet, answer_trie
from narvl_jax.errors import UserError
from tests.decoding.slow_beam_search import allowed_next, log_softmax
from tests.decoding.table_model import (
  BATCH,
  BOS,
  CLASSES,
  EOS,
  PAD,
  fixed_shape,
  logits_of,
  random_answers,
  random_model,
  reorder,
  step,
)

GROUP, LENGTH = 3, 4


def _extend(tokens, model):
  """All places at once, from a cache of one hypothesis for all."""
  seen = jnp.broadcast_to(model.seen, tokens.shape[:2])
  model = model._replace(seen=seen)
  logits = []
  for t in range(tokens.shape[2]):
    now, model = step(tokens[..., t], t, model)
    logits.append(now)
  return jnp.stack(logits, axis=2)


@functools.partial(jax.jit, static_argnames=("vocab_size", "group_size"))
def _score(
  model,
  first,
  ids,
  lengths,
  constraint=None,
  forbidden=None,
  vocab_size=None,
  group_size=GROUP,
):
  return score_candidates(
    _extend,
    model,
    first,
    ids,
    lengths,
    eos_id=EOS,
    group_size=group_size,
    constraint=constraint,
    vocab_size=vocab_size,
    forbidden=forbidden,
  )


def _slow_score(model, i, first, answer, answers, size, forbidden) -> float:
  total = 0.0
  for n, token in enumerate([*answer, EOS]):
    allowed = allowed_next(answers, answer[:n], size, EOS) - set(forbidden)
    logits = logits_of(model, i, first, answer[:n])[:size]
    total += log_softmax(logits, allowed)[token]
  return total


def _arrays(answers, rows: int) -> tuple[np.ndarray, np.ndarray]:
  """Repeats answers up to so many, for as many shapes compile."""
  answers = [answers[i % len(answers)] for i in range(rows)]
  ids = np.full((rows, LENGTH), PAD, np.int32)
  for row, answer in zip(ids, answers, strict=True):
    row[: len(answer)] = answer
  return ids, np.asarray([len(a) for a in answers], np.int32)


@pytest.mark.parametrize("constrained", [True, False])
def test_equals_one_answer_at_a_time(constrained):
  rng = np.random.default_rng(0)
  # Not a whole number of groups.
  rows, size = 2 * GROUP + 1, CLASSES - 1
  impossible = 0
  for _ in range(25):
    model = random_model(rng, beam=1)
    first = rng.choice([BOS, 3, 4], size=BATCH).astype(np.int32)
    answers = [a for a in random_answers(rng) if max(a) < size] or [(3,)]
    forbidden = [int(rng.choice([0, 3]))]
    # Some that are asked for are not allowed.
    allowed = answers[: len(answers) // 2 + 1] if constrained else None
    ids, lengths = _arrays(answers, rows)
    trie = fixed_shape(answer_trie(allowed)) if allowed else None
    mask = np.isin(np.arange(size), forbidden)
    scores = _score(model, first, ids, lengths, trie, mask, vocab_size=size)
    for i in range(BATCH):
      expected = [
        _slow_score(
          model,
          i,
          int(first[i]),
          tuple(map(int, row[:length])),
          allowed,
          size,
          forbidden,
        )
        for row, length in zip(ids, lengths, strict=True)
      ]
      np.testing.assert_allclose(scores[i], expected, rtol=1e-5, atol=1e-5)
      impossible += np.isinf(expected).sum()
  assert impossible > 10


@pytest.mark.parametrize("group_size", [1, 2, 5, 9])
def test_groups_do_not_matter(group_size):
  rng = np.random.default_rng(1)
  model = random_model(rng, beam=1)
  first = jnp.full(BATCH, BOS, jnp.int32)
  answers = [(3,), (3, 4), (5, 6, 7), (4, 4), (6,)]
  ids, lengths = _arrays(answers, 5)
  trie = fixed_shape(answer_trie(answers))
  expected = _score(model, first, ids, lengths, trie)
  scores = _score(model, first, ids, lengths, trie, group_size=group_size)
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
  # A distribution over all answers.
  np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1, rtol=1e-5)


def test_logits_of_an_alphabet_are_enough():
  model = random_model(np.random.default_rng(4), beam=1)
  first = jnp.full(BATCH, BOS, jnp.int32)
  # Of these the constraint lacks some, and the alphabet their tokens.
  answers = [(3,), (3, 5), (4, 3), (5, 5, 3), (7,), (3, 7)]
  ids, lengths = _arrays(answers, len(answers))
  trie = fixed_shape(answer_trie([(3,), (3, 5), (5, 5, 3)]))
  letters = alphabet(answer_trie([(3,), (3, 5), (5, 5, 3)]), EOS)
  assert letters.tolist() == [EOS, 3, 5]
  whole = _score(model, first, ids, lengths, trie)
  part = score_candidates(
    jax.jit(lambda tokens, model: _extend(tokens, model)[..., letters]),
    jax.tree.map(jnp.asarray, model),
    first,
    ids,
    lengths,
    eos_id=EOS,
    group_size=GROUP,
    constraint=trie,
    vocab_size=CLASSES,
    alphabet=letters,
  )
  np.testing.assert_allclose(part, whole, rtol=1e-6)
  assert (np.isinf(part).sum(axis=1) == 3).all()


def test_a_beam_as_large_as_the_set_finds_the_same_answers():
  rng = np.random.default_rng(2)
  answers = [(3,), (3, 4), (5, 6, 7), (4, 4), (6,)]
  ids, lengths = _arrays(answers, len(answers))
  trie = fixed_shape(answer_trie(answers))
  first = jnp.full(BATCH, BOS, jnp.int32)
  search = jax.jit(
    lambda model: beam_search(
      step,
      reorder,
      model,
      first,
      eos_id=EOS,
      pad_id=PAD,
      beam_size=len(answers),
      num_best=len(answers),
      length_limit=LENGTH,
      normalize=False,
      constraint=trie,
    )
  )
  best = set()
  for _ in range(20):
    model = random_model(rng, beam=len(answers))
    one = model._replace(seen=model.seen[:, :1])
    scores = np.asarray(_score(one, first, ids, lengths, trie))
    found = jax.device_get(search(model))
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(found["ids"], ids[order])
    np.testing.assert_array_equal(found["lengths"], lengths[order])
    np.testing.assert_allclose(
      found["log_probs"], np.take_along_axis(scores, order, 1), rtol=1e-5
    )
    best |= set(order[:, 0].tolist())
  assert len(best) > 3


def test_one_group_of_logits_is_held_at_a_time():
  answers = [(i % 5 + 3, i // 5 + 3) for i in range(25)]
  ids, lengths = _arrays(answers, len(answers))
  model = random_model(np.random.default_rng(3), beam=1)
  text = str(
    jax.make_jaxpr(_score)(model, jnp.zeros(BATCH, jnp.int32), ids, lengths)
  )
  assert f"f32[{BATCH},{GROUP},{LENGTH + 1},{CLASSES}]" in text
  assert f"f32[{BATCH},25,{LENGTH + 1},{CLASSES}]" not in text
  assert f"f32[{BATCH},27,{LENGTH + 1},{CLASSES}]" not in text


def test_wrong_sizes_are_rejected():
  empty = np.zeros((0, 3), np.int32)
  arguments = (_extend, None, jnp.zeros(1, jnp.int32))
  with pytest.raises(UserError, match="no answers to score; give at least one"):
    score_candidates(*arguments, empty, empty[:, 0], eos_id=EOS, group_size=1)
  ids = np.full((1, 1), 3)
  with pytest.raises(UserError, match=r"group_size=0 at a time; nearest: 1"):
    score_candidates(*arguments, ids, ids[0], eos_id=EOS, group_size=0)
