import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.constraint import answer_trie, repeated
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import automaton
from narvl_jax.query_ctc.prefix_beam_search import prefix_beam_search
from tests.query_ctc import slow_search

search = jax.jit(
  prefix_beam_search,
  static_argnames=(
    "blank_id",
    "pad_id",
    "beam_size",
    "num_best",
    "candidates_per_query",
  ),
)
# More than there are sequences of up to 4 of 3 labels.
ALL = 128


def random_log_probs(
  seed: int, b: int, n: int, v: int, scale: float = 2.0
) -> np.ndarray:
  z = np.random.default_rng(seed).normal(size=(b, n, v)) * scale
  return np.asarray(jax.nn.log_softmax(z.astype(np.float32)))


def assert_equal(
  found: tuple[Any, Any, Any],
  row: int,
  expected: list[tuple[tuple[int, ...], float]],
  pad: int,
) -> None:
  """Compares the n-best list of a row; what is missing must look so."""
  ids, lengths, scores = (np.asarray(x[row]) for x in found)
  for place in range(len(ids)):
    if place < len(expected):
      answer, score = expected[place]
    else:
      answer, score = (), -1e9
    assert tuple(ids[place, : lengths[place]]) == answer
    assert np.all(ids[place, lengths[place] :] == pad)
    np.testing.assert_allclose(scores[place], score, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("blank", [0, 3])
def test_wide_beam_is_the_sum_over_all_alignments(blank: int) -> None:
  # Both rules of reading in one batch.
  log_probs = random_log_probs(0, 8, 4, 4)
  merge = np.arange(8) % 2 == 0
  found = search(
    log_probs,
    blank_id=blank,
    pad_id=99,
    beam_size=ALL,
    num_best=ALL,
    merge_repeats=merge,
  )
  for row in range(8):
    table = slow_search.all_answers(log_probs[row], blank, bool(merge[row]))
    ranked = sorted(table.items(), key=lambda item: -item[1])
    assert len(ranked) > 30
    assert_equal(found, row, ranked, 99)


def test_pad_is_not_a_label() -> None:
  log_probs = random_log_probs(1, 4, 4, 4)
  found = search(log_probs, blank_id=3, pad_id=1, beam_size=ALL, num_best=ALL)
  for row in range(4):
    table = slow_search.all_answers(log_probs[row], 3, True, pad=1)
    ranked = sorted(table.items(), key=lambda item: -item[1])
    assert_equal(found, row, ranked, 1)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 5])
def test_narrow_beams_equal_the_plain_search(beam_size: int) -> None:
  log_probs = random_log_probs(beam_size, 40, 7, 6, scale=1.0)
  merge = np.arange(40) % 3 > 0
  options = {"blank_id": 5, "pad_id": 1, "beam_size": beam_size}
  for candidates in (None, 2):
    found = search(
      log_probs,
      **options,
      num_best=beam_size,
      merge_repeats=merge,
      candidates_per_query=candidates,
    )
    for row in range(40):
      expected = slow_search.prefix_beam_search(
        log_probs[row],
        blank=5,
        pad=1,
        beam_size=beam_size,
        merge=bool(merge[row]),
        candidates=candidates,
      )
      assert_equal(found, row, expected, 1)


ANSWERS = [(0, 0), (0, 2, 2), (2,), (2, 0, 3, 3), (3, 0), (3, 0, 2, 0), (0, 3)]


@functools.cache
def trie_of(count: int) -> Any:
  return answer_trie(ANSWERS[:count])


def test_constraint_and_wide_beam() -> None:
  log_probs = random_log_probs(5, 6, 5, 5)
  merge = np.arange(6) % 2 == 0
  found = search(
    log_probs,
    blank_id=4,
    pad_id=1,
    beam_size=20,
    num_best=8,
    merge_repeats=merge,
    constraint=trie_of(len(ANSWERS)),
  )
  for row in range(6):
    table = slow_search.all_answers(log_probs[row], 4, bool(merge[row]))
    ranked = [(a, table[a]) for a in ANSWERS if a in table]
    ranked.sort(key=lambda item: -item[1])
    assert_equal(found, row, ranked, 1)
    assert len(ranked) == len(ANSWERS)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_constraint_and_narrow_beam(beam_size: int) -> None:
  log_probs = random_log_probs(6, 60, 5, 5)
  merge = np.arange(60) % 2 == 0
  found = search(
    log_probs,
    blank_id=4,
    pad_id=1,
    beam_size=beam_size,
    num_best=beam_size,
    merge_repeats=merge,
    constraint=trie_of(len(ANSWERS)),
  )
  # Prefixes without a future are dropped in time, so none ends without answer.
  assert np.all(np.asarray(found[1][:, 0]) > 0)
  for row in range(60):
    expected = slow_search.prefix_beam_search(
      log_probs[row],
      blank=4,
      pad=1,
      beam_size=beam_size,
      merge=bool(merge[row]),
      answers=ANSWERS,
    )
    assert_equal(found, row, expected, 1)


def test_zero_probabilities_never_win() -> None:
  # The only answers that fit need a class of probability zero, but for one.
  log_probs = np.full((2, 3, 4), -np.inf, np.float32)
  log_probs[:, :, 3] = np.log(0.9)
  log_probs[:, :, 2] = np.log(0.1)
  log_probs[1, :, 2] = -np.inf
  found = search(
    log_probs,
    blank_id=3,
    pad_id=1,
    beam_size=4,
    num_best=4,
    constraint=answer_trie([(0,), (2,), (0, 2), (2, 0)]),
  )
  p = 3 * 0.1 * 0.81 + 2 * 0.01 * 0.9 + 0.001
  assert_equal(found, 0, [((2,), np.log(p))], 1)
  assert_equal(found, 1, [], 1)


def test_infeasible_sequences_are_not_answers() -> None:
  log_probs = random_log_probs(7, 2, 3, 5)
  constraint = answer_trie([(0, 0), (2, 2, 3), (0, 2, 0, 2)])
  found = search(
    log_probs,
    blank_id=4,
    pad_id=1,
    beam_size=6,
    num_best=6,
    merge_repeats=np.array([True, False]),
    constraint=constraint,
  )
  # A repeat needs a blank where repeats are merged.
  for row, fit in enumerate([[(0, 0)], [(0, 0), (2, 2, 3)]]):
    table = slow_search.all_answers(log_probs[row], 4, row == 0)
    ranked = sorted([(a, table[a]) for a in fit], key=lambda x: -x[1])
    assert_equal(found, row, ranked, 1)
  with_two = search(
    log_probs[:, :2],
    blank_id=4,
    pad_id=1,
    beam_size=6,
    constraint=constraint,
  )
  assert np.all(np.asarray(with_two[1]) == 0)
  assert np.all(np.asarray(with_two[2]) == np.float32(-1e9))


@pytest.mark.parametrize("merge", [True, False])
def test_queries_needed(merge: bool) -> None:
  trie = answer_trie([(0, 0, 0), (0, 0, 2), (2, 2, 2), (3, 0)])
  needed = automaton.queries_needed(trie, merge, 8)
  # After "0" another 0 may only follow by way of a blank.
  after = {
    (int(s), int(t)): int(x)
    for s, t, x in zip(trie.source, trie.token, needed.after_edge, strict=True)
  }
  assert after[0, 0] == 2 + merge
  assert after[0, 2] == 2 + 2 * merge
  assert after[0, 3] == 1
  assert int(needed.from_state[0]) == 2
  boxes = repeated([5, 6], 4, then=[2])
  assert int(automaton.queries_needed(boxes, merge, 8).from_state[0]) == 5
  far = automaton.queries_needed(boxes, merge, 4).from_state[0]
  assert int(far) == automaton.UNREACHABLE
  single = automaton.queries_needed(repeated([5], 4), merge, 8)
  assert int(single.from_state[0]) == 4 + 3 * merge


def test_runs_under_vmap() -> None:
  log_probs = jnp.asarray(random_log_probs(8, 6, 4, 4))
  options: dict[str, Any] = {
    "blank_id": 3,
    "pad_id": 1,
    "beam_size": 3,
    "num_best": 2,
  }
  whole = search(log_probs, **options)
  mapped = jax.vmap(lambda x: prefix_beam_search(x, **options))(
    log_probs.reshape(2, 3, 4, 4)
  )
  for a, b in zip(whole, mapped, strict=True):
    np.testing.assert_allclose(b.reshape(a.shape), a, rtol=1e-6)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"beam_size": 0}, r"beam_size is 0; nearest: 1 \(--beam_size\)"),
    ({"num_best": 0}, "num_best is 0; nearest: 1"),
    ({"num_best": 5}, r"contains 4 prefixes; nearest: 4 \(--num_best\)"),
    ({"candidates_per_query": 0}, "candidates_per_query is 0; nearest: 1"),
  ],
)
def test_bad_sizes(sizes: dict[str, int], message: str) -> None:
  log_probs = jnp.asarray(random_log_probs(9, 1, 2, 4))
  options: dict[str, Any] = {
    "blank_id": 3,
    "pad_id": 1,
    "beam_size": 4,
    **sizes,
  }
  with pytest.raises(UserError, match=message):
    prefix_beam_search(log_probs, **options)
