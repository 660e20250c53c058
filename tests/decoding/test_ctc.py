import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding import ctc
from narvl_jax.decoding.constraint import Automaton, answer_trie, repeated
from narvl_jax.decoding.greedy import greedy_decode
from narvl_jax.errors import UserError
from narvl_jax.query_ctc import query_ctc_loss
from tests.query_ctc import slow_search

BLANK, PAD = 3, 99
IDS: dict[str, Any] = {"blank_id": BLANK, "pad_id": PAD}

constrained_greedy = jax.jit(
  ctc.constrained_greedy, static_argnames=("blank_id", "pad_id", "vocab_size")
)
best_candidate = jax.jit(
  ctc.best_candidate, static_argnames=("blank_id", "vocab_size")
)


def random_logits(seed: int, b: int, n: int, v: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(b, n, v)) * 2 + 5).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  return np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))


def padded(
  answers: list[tuple[int, ...]], size: int
) -> tuple[np.ndarray, np.ndarray]:
  ids = np.full((len(answers), size), PAD, np.int32)
  for row, answer in enumerate(answers):
    ids[row, : len(answer)] = answer
  return ids, np.array([len(a) for a in answers], np.int32)


ANSWERS = [(0,), (1, 1), (0, 0, 2), (2, 1, 2), (1, 1, 1, 1), (2, 2), (0, 2, 1)]


def test_candidates_equal_the_sum_over_all_alignments() -> None:
  logits = random_logits(0, 8, 5, 4)
  merge = np.arange(8) % 2 == 0
  candidates, lengths = padded(ANSWERS, 6)
  best, found = best_candidate(
    logits, candidates, lengths, blank_id=BLANK, merge_repeats=merge
  )
  for row in range(8):
    table = slow_search.all_answers(
      log_softmax(logits[row]), BLANK, bool(merge[row])
    )
    expected = [table.get(answer, -1e9) for answer in ANSWERS]
    np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
    assert best[row] == np.argmax(expected)
  # Four equal labels need seven queries if they are merged, four if not.
  assert np.all((np.asarray(found)[:, 4] < -1e8) == merge)


def test_candidates_equal_the_loss() -> None:
  logits = random_logits(1, 2, 12, 50)
  rng = np.random.default_rng(1)
  candidates = rng.integers(4, 50, (30, 6)).astype(np.int32)
  candidates[::3, 1] = candidates[::3, 0]
  lengths = rng.integers(1, 7, 30).astype(np.int32)
  _, found = best_candidate(logits, candidates, lengths, blank_id=BLANK)
  for row in range(2):
    one = np.broadcast_to(logits[row], (30, 12, 50))
    loss = query_ctc_loss(
      jnp.asarray(one),
      jnp.asarray(candidates),
      jnp.asarray(lengths),
      blank_id=BLANK,
    )
    np.testing.assert_allclose(found[row], -loss, rtol=1e-5)


def test_no_candidates() -> None:
  empty = np.zeros((0, 3), np.int32)
  with pytest.raises(UserError, match="no candidates to choose from"):
    ctc.best_candidate(
      jnp.zeros((1, 2, 4)), empty, np.zeros(0, np.int32), blank_id=BLANK
    )


def random_automaton(seed: int) -> Automaton:
  """Four states with loops, many ways into each, often by one token."""
  rng = np.random.default_rng(seed)
  pairs = [(s, t) for s in range(4) for t in range(3)]
  edges = [(s, t, int(rng.integers(4))) for s, t in pairs if rng.random() < 0.7]
  # All have as many edges, so that one compiled program serves them; the
  # others leave a state that nothing enters.
  edges = (edges + [(4, 0, 3)] * 12)[:12]
  accepting = np.append(rng.random(4) < 0.4, True)
  return Automaton(*np.array(edges, np.int32).T, accepting=accepting)


def answers_of(automaton: Automaton, most: int) -> list[tuple[int, ...]]:
  """Returns all answers of so many labels, by walking."""
  edges = list(
    zip(automaton.source, automaton.token, automaton.target, strict=True)
  )
  walks, answers = [((), 0)], []
  for _ in range(most + 1):
    answers += [w for w, state in walks if automaton.accepting[state]]
    walks = [
      ((*w, int(t)), int(d))
      for w, state in walks
      for s, t, d in edges
      if s == state
    ]
  return answers


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_the_best_alignment(seed: int) -> None:
  logits = random_logits(seed, 4, 5, 4)
  merge = np.arange(4) % 2 == 0
  automaton = random_automaton(seed)
  found = constrained_greedy(logits, automaton, **IDS, merge_repeats=merge)
  answers = answers_of(automaton, 5)
  for row in range(4):
    log_probs, rule = log_softmax(logits[row]), bool(merge[row])
    answer, score = slow_search.best_alignment(log_probs, BLANK, rule, answers)
    length = int(found["lengths"][row])
    assert tuple(np.asarray(found["ids"][row, :length])) == answer
    assert np.all(np.asarray(found["ids"][row, length:]) == PAD)
    total = slow_search.all_answers(log_probs, BLANK, rule).get(answer, 0)
    if score == -np.inf:
      score = total = -1e9
    np.testing.assert_allclose(
      [found["path_log_prob"][row], found["log_prob"][row]],
      [score, total],
      rtol=1e-5,
      atol=1e-5,
    )


def test_equal_labels_of_different_edges_need_a_blank() -> None:
  # Two ways lead by 0 into state 1, which 0 leaves again: neither may be
  # followed by that at once.
  automaton = Automaton(
    *np.array(
      [(0, 0, 1), (2, 0, 1), (0, 1, 2), (0, 2, 1), (1, 0, 3)], np.int32
    ).T,
    accepting=np.arange(4) == 3,
  )
  probabilities = [
    [0.5, 0.1, 0.05, 0.35],
    [0.9, 0.07, 0.02, 0.01],
    [0.9, 0.05, 0.04, 0.01],
  ]
  logits = np.log(np.array([probabilities], np.float32))
  found = constrained_greedy(logits, automaton, **IDS, merge_repeats=True)
  assert np.asarray(found["ids"]).tolist() == [[2, 0, PAD]]
  path = np.log(0.05 * 0.9 * 0.9)
  np.testing.assert_allclose(found["path_log_prob"], path, rtol=1e-5)


def test_some_random_automata_have_answers() -> None:
  counts = [len(answers_of(random_automaton(seed), 5)) for seed in range(12)]
  assert sum(count > 10 for count in counts) >= 6
  assert 0 in counts


def test_free_automaton_is_greedy_decoding() -> None:
  logits = random_logits(2, 20, 6, 5)
  loop = Automaton(
    *np.array([[0, t, 0] for t in (0, 1, 2, 4)], np.int32).T,
    accepting=np.ones(1, bool),
  )
  merge = np.arange(20) % 2 == 0
  options = {**IDS, "merge_repeats": merge}
  found = constrained_greedy(logits, loop, **options)
  greedy = greedy_decode(
    jnp.asarray(logits), jnp.asarray(merge), blank_id=BLANK, pad_id=PAD
  )
  np.testing.assert_array_equal(found["ids"], greedy["ids"])
  np.testing.assert_allclose(
    found["log_prob"], greedy["log_prob"], rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("merge", [True, False])
def test_a_narrow_beam_reports_the_likelihood_over_all_alignments(
  merge: bool,
) -> None:
  logits = random_logits(9, 8, 5, 4)
  found = ctc.prefix_beam(
    jnp.asarray(logits), **IDS, beam_size=2, num_best=2, merge_repeats=merge
  )
  log_probs = np.asarray(found["log_probs"])
  assert np.all(np.diff(log_probs, axis=1) <= 0)
  for row, logits_of_row in enumerate(logits):
    table = slow_search.all_answers(log_softmax(logits_of_row), BLANK, merge)
    for place, length in enumerate(found["lengths"][row].tolist()):
      answer = tuple(found["ids"][row, place, :length].tolist())
      np.testing.assert_allclose(
        log_probs[row, place], table[answer], rtol=1e-5, atol=1e-6
      )


@pytest.mark.parametrize("num_queries", [4, 6])
def test_four_coordinates(num_queries: int) -> None:
  logits = random_logits(3, 6, num_queries, 12)
  # Without the constraint the model predicts anything but coordinates.
  logits[..., :6] += 6
  boxes = repeated(range(6, 10), 4)
  found = constrained_greedy(logits, boxes, **IDS, merge_repeats=False)
  ids = np.asarray(found["ids"])
  assert np.all(np.asarray(found["lengths"]) == 4)
  assert np.all((ids[:, :4] >= 6) & (ids[:, :4] < 10))
  if num_queries == 4:
    np.testing.assert_array_equal(ids, np.argmax(logits[..., 6:10], -1) + 6)


@pytest.mark.parametrize("method", ["greedy", "candidates", "beam"])
def test_forbidden_classes_leave_the_softmax(method: str) -> None:
  """As if the class had no logit; the table's padding likewise."""
  logits = random_logits(4, 3, 4, 7)
  forbidden = np.array([False, True, False, False, False])
  # What remains, in the same order: labels 0 and 2, blank, label 4.
  small = logits[..., [0, 2, 3, 4]]
  old, new = [(0,), (0, 2), (4, 0)], [(0,), (0, 1), (3, 0)]
  mask: dict[str, Any] = {"forbidden": forbidden, "vocab_size": 5}
  if method == "candidates":
    one = ctc.best_candidate(
      jnp.asarray(logits), *padded([*old, (1,)], 2), blank_id=3, **mask
    )[1]
    two = ctc.best_candidate(jnp.asarray(small), *padded(new, 2), blank_id=2)[1]
    assert np.all(np.asarray(one)[:, 3] < -1e8)
    np.testing.assert_allclose(one[:, :3], two, rtol=1e-5)
    return
  decode: Any = ctc.constrained_greedy
  size: dict[str, Any] = {}
  if method == "beam":
    decode, size = ctc.prefix_beam, {"beam_size": 8}

  def run(logits: np.ndarray, answers: Any, blank: int, **mask: Any) -> Any:
    options = {"constraint": answer_trie(answers), "pad_id": PAD, **size}
    return jax.jit(
      functools.partial(decode, blank_id=blank, **options, **mask)
    )(logits)

  one = run(logits, [*old, (1,), (1, 0)], 3, **mask)
  two = run(small, new, 2)
  key = "log_prob" if method == "greedy" else "log_probs"
  np.testing.assert_allclose(one[key], two[key], rtol=1e-5)
  np.testing.assert_array_equal(one["lengths"], two["lengths"])


def test_bfloat16_logits() -> None:
  logits = jnp.asarray(random_logits(5, 2, 5, 8), jnp.bfloat16)
  candidates, lengths = padded(ANSWERS, 4)
  _, found = ctc.best_candidate(logits, candidates, lengths, blank_id=BLANK)
  _, exact = ctc.best_candidate(
    logits.astype(jnp.float32), candidates, lengths, blank_id=BLANK
  )
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_beam_finds_the_best_candidate() -> None:
  logits = jnp.asarray(random_logits(6, 10, 5, 4))
  found = ctc.prefix_beam(
    logits, **IDS, beam_size=20, constraint=answer_trie(ANSWERS)
  )
  best, log_probs = ctc.best_candidate(
    logits, *padded(ANSWERS, 5), blank_id=BLANK
  )
  ids, _ = padded(ANSWERS, 5)
  np.testing.assert_array_equal(found["ids"][:, 0], ids[np.asarray(best)])
  np.testing.assert_allclose(
    found["log_probs"][:, 0], jnp.max(log_probs, axis=1), rtol=1e-5
  )


def test_check_constraint() -> None:
  boxes = repeated([5, 5 + 1], 4, then=[2])
  ctc.check_constraint(boxes, 5, merge_repeats=True)
  message = r"needs 5 queries, .* has 4; nearest: --config.model.num_queries=5"
  with pytest.raises(UserError, match=message):
    ctc.check_constraint(boxes, 4, merge_repeats=True)
  equal = answer_trie([(7, 7, 7)])
  ctc.check_constraint(equal, 3, merge_repeats=False)
  with pytest.raises(UserError, match="needs 5 queries"):
    ctc.check_constraint(equal, 4, merge_repeats=True)
  no_end = equal._replace(accepting=np.zeros(4, bool))
  with pytest.raises(UserError, match="no path leads to an end"):
    ctc.check_constraint(no_end, 9, merge_repeats=True)
