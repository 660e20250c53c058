"""Scores of logits of any magnitude, of masked classes and of NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding import ctc
from narvl_jax.decoding.constraint import answer_trie
from narvl_jax.decoding.greedy import greedy_decode
from narvl_jax.errors import UserError
from narvl_jax.query_ctc.prefix_beam_search import prefix_beam_search
from tests.query_ctc import reference, slow_search

B, N, V, BLANK, PAD = 4, 4, 5, 3, 4
MAGNITUDES = [1.0, 1e3, 1e6, 1e30, -1e30]
# Class 1 is forbidden and class 5 padding of the table.
FORBIDDEN = np.arange(V) == 1
# The last needs more queries than there are, with or without merging.
ANSWERS = [(0,), (2, 0), (0, 0), (2, 2, 2), (0, 2, 0, 2, 0)]
CANDIDATES = np.array([[*a, *[PAD] * (5 - len(a))] for a in ANSWERS], np.int32)
LENGTHS = np.array([len(a) for a in ANSWERS], np.int32)
MERGE = np.arange(B) % 2 == 0
OPTIONS = {"blank_id": BLANK, "forbidden": FORBIDDEN, "vocab_size": V}


def problem(magnitude: float) -> tuple[np.ndarray, list[dict]]:
  """Returns logits [B, N, V + 1], and what every answer has in float64."""
  rng = np.random.default_rng(0)
  logits = (magnitude * np.abs(rng.normal(size=(B, N, V + 1)))).astype("f")
  allowed = np.where(FORBIDDEN, -np.inf, logits[..., :V].astype(np.float64))
  tables = [
    slow_search.all_answers(reference.log_softmax(z), BLANK, bool(merge))
    for z, merge in zip(allowed, MERGE, strict=True)
  ]
  return logits, tables


@jax.jit
def candidates(logits):
  return ctc.best_candidate(
    logits, CANDIDATES, LENGTHS, merge_repeats=MERGE, **OPTIONS
  )


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_candidates(magnitude: float) -> None:
  logits, tables = problem(magnitude)
  best, found = (np.asarray(x) for x in candidates(logits))
  for row, table in enumerate(tables):
    expected = np.array([table.get(a, -np.inf) for a in ANSWERS])
    possible = expected > -np.inf
    np.testing.assert_allclose(
      found[row][possible], expected[possible], rtol=2e-6, atol=1e-6
    )
    assert best[row] == np.argmax(expected)
    # What is impossible comes after all that is not, however unlikely.
    assert np.max(found[row][~possible]) < np.min(found[row][possible])
    assert np.all(found[row][~possible] <= -1e9)


@jax.jit
def constrained(logits):
  return ctc.constrained_greedy(
    logits,
    answer_trie(ANSWERS[2:4]),
    pad_id=PAD,
    merge_repeats=MERGE,
    **OPTIONS,
  )


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_the_best_path_of_a_constraint(magnitude: float) -> None:
  logits, tables = problem(magnitude)
  found = jax.tree.map(np.asarray, constrained(logits))
  for row, table in enumerate(tables):
    answer = tuple(found["ids"][row, : found["lengths"][row]].tolist())
    assert answer in ANSWERS[2:4]
    np.testing.assert_allclose(found["log_prob"][row], table[answer], rtol=2e-6)


@jax.jit
def beam(logits):
  return ctc.prefix_beam(
    logits,
    pad_id=PAD,
    beam_size=8,
    num_best=3,
    merge_repeats=MERGE,
    constraint=answer_trie(ANSWERS[1:4]),
    **OPTIONS,
  )


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_prefix_beam_search(magnitude: float) -> None:
  logits, tables = problem(magnitude)
  found = jax.tree.map(np.asarray, beam(logits))
  for row, table in enumerate(tables):
    ranked = [(table[a], a) for a in ANSWERS[1:4] if a in table]
    ranked.sort(reverse=True)
    for place in range(3):
      ids = found["ids"][row, place, : found["lengths"][row, place]]
      score = found["log_probs"][row, place]
      if place < len(ranked):
        assert tuple(ids.tolist()) == ranked[place][1]
        np.testing.assert_allclose(
          score, ranked[place][0], rtol=2e-6, atol=1e-6
        )
      else:
        assert len(ids) == 0
        assert score <= min(-1e9, ranked[-1][0])


def greedy(logits):
  return greedy_decode(logits, MERGE, pad_id=PAD, **OPTIONS)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_greedy(magnitude: float) -> None:
  logits, tables = problem(magnitude)
  found = jax.tree.map(np.asarray, jax.jit(greedy)(logits))
  allowed = np.where(FORBIDDEN, -np.inf, logits[..., :V].astype(np.float64))
  log_probs = reference.log_softmax(allowed)
  for row, table in enumerate(tables):
    path = np.argmax(log_probs[row], axis=-1)
    answer = slow_search.collapse(path.tolist(), BLANK, bool(MERGE[row]))
    answer = tuple(c for c in answer if c != PAD)
    ids = found["ids"][row, : found["lengths"][row]]
    assert tuple(ids.tolist()) == answer
    if PAD not in path:
      np.testing.assert_allclose(
        found["log_prob"][row], table[answer], rtol=2e-6, atol=1e-6
      )


def test_nan_shows_in_the_score() -> None:
  logits, _ = problem(1.0)
  clean = [jax.tree.map(np.asarray, f(logits)) for f in (constrained, beam)]
  logits[1, 2, 0] = np.nan
  _, scores = candidates(logits)
  assert np.isnan(scores[1][:4]).all()
  assert np.isfinite(np.delete(scores, 1, 0)).all()
  best, searched = (
    jax.tree.map(np.asarray, f(logits)) for f in (constrained, beam)
  )
  for name in ("log_prob", "path_log_prob"):
    assert np.isnan(best[name][1])
  assert np.isnan(searched["log_probs"][1]).all()
  assert not searched["lengths"][1].any()
  assert (searched["ids"][1] == PAD).all()
  for found, wanted in zip((best, searched), clean, strict=True):
    for name, x in found.items():
      np.testing.assert_array_equal(
        np.delete(x, 1, 0), np.delete(wanted[name], 1, 0)
      )
  assert np.isnan(jax.jit(greedy)(logits)["log_prob"][1])


def test_an_answer_of_probability_zero_is_none() -> None:
  logits, _ = problem(1.0)
  logits[..., 0] = -np.inf
  logits[..., 2] = -np.inf
  found = constrained(logits)
  assert not np.any(found["lengths"])
  assert np.all(np.asarray(found["log_prob"]) == np.float32(-1e9))
  found = beam(logits)
  assert not np.any(found["lengths"])
  assert np.all(np.asarray(found["log_probs"]) == np.float32(-1e9))


def test_dtypes_with_64_bits() -> None:
  with jax.enable_x64(True):
    logits = jnp.asarray(problem(1.0)[0], jnp.float64)
    for function in (candidates, constrained, beam, jax.jit(greedy)):
      for x in jax.tree.leaves(function(logits)):
        assert x.dtype in (np.float32, np.int32)


@pytest.mark.parametrize(
  ("label", "message"),
  [
    (BLANK, r"label 3 of example 1 at place 0 .*0 to 4, but not blank \(3\)"),
    (V, "label 5 of example 1 at place 0"),
    (-1, "label -1 of example 1 at place 0"),
  ],
)
def test_candidates_that_are_no_answers(label: int, message: str) -> None:
  wrong = CANDIDATES.copy()
  wrong[1, 0] = label
  with pytest.raises(UserError, match=message):
    ctc.best_candidate(jnp.asarray(problem(1.0)[0]), wrong, LENGTHS, **OPTIONS)


def test_no_query() -> None:
  with pytest.raises(UserError, match=r"\(2, 0, 5\) have no query"):
    prefix_beam_search(
      jnp.zeros((2, 0, V)), blank_id=BLANK, pad_id=PAD, beam_size=2
    )
