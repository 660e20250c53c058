"""Beam search against plain Python on random models."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding.beam_search import beam_search
from narvl_jax.decoding.constraint import alphabet, answer_trie
from narvl_jax.errors import UserError
from tests.decoding.slow_beam_search import Hypothesis, slow_beam_search
from tests.decoding.table_model import (
  BATCH,
  BOS,
  CLASSES,
  EOS,
  PAD,
  ROWS,
  fixed_shape,
  logits_of,
  random_answers,
  random_model,
  reorder,
  step,
)

LIMIT = 6


class Setting(NamedTuple):
  """The static arguments; all others vary."""

  beam: int
  ngram: int = 0
  normalize: bool = True
  constrained: bool = False
  vocab_size: int | None = None


@functools.cache
def _searcher(setting: Setting):
  def run(model, first, min_length, max_length, forbidden, constraint):
    return beam_search(
      step,
      reorder,
      model,
      first,
      eos_id=EOS,
      pad_id=PAD,
      beam_size=setting.beam,
      num_best=setting.beam,
      length_limit=LIMIT,
      min_length=min_length,
      max_length=max_length,
      no_repeat_ngram=setting.ngram,
      normalize=setting.normalize,
      constraint=constraint,
      vocab_size=setting.vocab_size,
      forbidden=forbidden,
    )

  return jax.jit(run)


def _hypotheses(found, i: int) -> list[Hypothesis]:
  """Decodes one example; checks properties of every result."""
  out = []
  for k, length in enumerate(found["lengths"][i]):
    ids = found["ids"][i, k]
    assert set(ids[length:]) <= {PAD}
    score = found["scores"][i, k]
    if score == -np.inf:
      assert length == 0
      assert found["log_probs"][i, k] == -np.inf
    else:
      ids = tuple(map(int, ids[:length]))
      out.append(Hypothesis(ids, score, found["log_probs"][i, k]))
  return out


def _check(setting: Setting, model, rng, answers=None, forbidden=()) -> list:
  """Compares a batch; returns the results of the plain search."""
  first = rng.choice([BOS, 3, 4], size=BATCH).astype(np.int32)
  least = rng.integers(0, 4, size=BATCH).astype(np.int32)
  most = np.minimum(least + rng.integers(0, 5, size=BATCH), LIMIT)
  size = setting.vocab_size or CLASSES
  mask = np.isin(np.arange(size), forbidden)
  constraint = fixed_shape(answer_trie(answers)) if answers else None
  found = _searcher(setting)(
    model, first, least, most.astype(np.int32), mask, constraint
  )
  found = jax.device_get(found)
  expected, steps = [], []
  for i in range(BATCH):
    hypotheses, used = slow_beam_search(
      lambda said, i=i: logits_of(model, i, int(first[i]), said)[:size],
      int(first[i]),
      eos=EOS,
      pad=PAD,
      beam=setting.beam,
      min_length=least[i],
      max_length=most[i],
      ngram=setting.ngram,
      normalize=setting.normalize,
      answers=answers,
      forbidden=forbidden,
    )
    actual = _hypotheses(found, i)
    assert [h.ids for h in actual] == [h.ids for h in hypotheses]
    for a, e in zip(actual, hypotheses, strict=True):
      np.testing.assert_allclose(a[1:], e[1:], rtol=1e-5, atol=1e-5)
    expected.append(hypotheses)
    steps.append(used)
  assert found["steps"] == max(steps)
  return expected


@pytest.mark.parametrize(
  "setting",
  [
    Setting(beam=1),
    Setting(beam=2, ngram=2),
    Setting(beam=3, ngram=3, normalize=False),
    Setting(beam=5, normalize=False),
    Setting(beam=5, ngram=1),
    # The largest possible: any token but pad.
    Setting(beam=5, vocab_size=6),
    Setting(beam=1, vocab_size=3),
  ],
  ids=str,
)
def test_equals_plain_search(setting):
  rng = np.random.default_rng(0)
  counts, lengths = set(), set()
  for _ in range(60):
    model = random_model(rng, setting.beam)
    size = setting.vocab_size or CLASSES
    # Sometimes very few tokens are left.
    gone = rng.choice(size, rng.integers(0, size - 1), replace=False)
    forbidden = [int(x) for x in gone if x != EOS]
    for hypotheses in _check(setting, model, rng, forbidden=forbidden):
      counts.add(len(hypotheses))
      lengths |= {len(h.ids) for h in hypotheses}
  assert setting.beam in counts
  assert len(lengths) > 3
  # Of these there are too few.
  assert min(counts) < setting.beam or setting.beam == 1


@pytest.mark.parametrize(
  "setting",
  [
    Setting(beam=1, constrained=True),
    Setting(beam=2, normalize=False, constrained=True),
    Setting(beam=3, ngram=2, constrained=True),
    Setting(beam=5, normalize=False, constrained=True),
  ],
  ids=str,
)
def test_equals_plain_search_among_given_answers(setting):
  rng = np.random.default_rng(1)
  several = none = 0
  for _ in range(60):
    model = random_model(rng, setting.beam)
    answers = random_answers(rng)
    forbidden = [int(x) for x in rng.choice([0, 3, 4], rng.integers(0, 2))]
    for hypotheses in _check(setting, model, rng, answers, forbidden):
      assert {h.ids for h in hypotheses} <= set(answers)
      several += len(hypotheses) > 1
      none += not hypotheses
  assert several > 20 or setting.beam == 1
  assert none > 5


@pytest.mark.parametrize(
  "setting",
  [
    Setting(beam=1),
    Setting(beam=3, ngram=3, normalize=False),
    Setting(beam=5, normalize=False),
  ],
  ids=str,
)
def test_lowest_index_wins_ties(setting):
  rng = np.random.default_rng(2)
  words = [i for i in range(CLASSES) if i != PAD]
  for number in range(30):
    # Probabilities 1, 1/2 and 1/4, so that different paths tie.
    table = np.full((BATCH, ROWS, CLASSES), -1e30, np.float32)
    for row in table.reshape(-1, CLASSES):
      row[rng.choice(words, rng.choice([1, 2, 4]), replace=False)] = 0
    if number == 0:
      table[:] = 0
    _check(setting, random_model(rng, setting.beam)._replace(table=table), rng)


def _search(table, beam_size=2, length_limit=4, **settings):
  """Searches a table [V, V] of logits given the token before."""
  table = jnp.asarray(table, jnp.float32)[None]
  cache = jnp.zeros((1, beam_size), jnp.int32)
  found = beam_search(
    lambda tokens, t, cache: (table[0][tokens], cache),
    lambda cache, parents: cache,
    cache,
    jnp.array([BOS]),
    eos_id=EOS,
    pad_id=PAD,
    beam_size=beam_size,
    length_limit=length_limit,
    **settings,
  )
  return jax.device_get(found)


def _table(**rows) -> np.ndarray:
  """Log-probabilities after each token; `_3=...` is the row of token 3."""
  table = np.full((5, 5), -np.inf, np.float32)
  for name, probs in rows.items():
    for token, prob in probs.items():
      table[int(name[1:]), token] = np.log(prob)
  return table


# Greedy search begins with 3; the most probable answer is "4", 0.4 * 0.9.
GARDEN_PATH = _table(
  _0={3: 0.6, 4: 0.4},
  _3={3: 0.3, 4: 0.2, EOS: 0.5},
  _4={3: 0.1, EOS: 0.9},
)


def test_a_beam_finds_what_greedy_search_misses():
  greedy = _search(GARDEN_PATH, beam_size=1)
  assert greedy["ids"].tolist() == [[[3, PAD, PAD, PAD]]]
  np.testing.assert_allclose(greedy["log_probs"], [[np.log(0.3)]], rtol=1e-5)
  beam = _search(GARDEN_PATH, num_best=2)
  assert beam["ids"][0].tolist() == [[4] + 3 * [PAD], [3] + 3 * [PAD]]
  assert beam["lengths"].tolist() == [[1, 1]]
  expected = np.log([[0.36, 0.3]])
  np.testing.assert_allclose(beam["log_probs"], expected, rtol=1e-5)
  # Eos counts as a token.
  np.testing.assert_allclose(beam["scores"], expected / 2, rtol=1e-5)
  raw = _search(GARDEN_PATH, normalize=False)
  assert raw["ids"].shape == (1, 1, 4)
  np.testing.assert_allclose(raw["scores"], expected[:, :1], rtol=1e-5)


def test_search_stops_once_enough_has_ended():
  # "3" and "4" end in the second pass, though there is room for 4 tokens.
  assert _search(GARDEN_PATH)["steps"] == 2
  assert _search(GARDEN_PATH, min_length=2)["steps"] > 2
  certain = _table(_0={3: 1.0}, _3={EOS: 1.0})
  # One answer is all there is.
  assert _search(certain)["steps"] == 2


def test_lengths_are_bounded():
  endless = _table(_0={3: 1.0}, _3={3: 0.9, EOS: 0.1})
  for longest, expected in ((None, 4), (9, 4), (2, 2), (0, 0)):
    found = _search(endless, beam_size=1, min_length=0, max_length=longest)
    assert found["lengths"] == [[expected]]
    assert found["steps"] == expected + 1
    # At no length does bos allow eos.
    assert np.isfinite(found["scores"]) == (expected > 0)
  # Only eos is left at the largest length, for any least length.
  found = _search(endless, beam_size=1, min_length=9, max_length=3)
  assert found["lengths"] == [[3]]


def test_missing_answers_are_empty_and_impossible():
  only = answer_trie([[3, 3]])
  found = _search(GARDEN_PATH, beam_size=3, num_best=3, constraint=only)
  assert found["lengths"].tolist() == [[2, 0, 0]]
  assert found["ids"][0].tolist() == [[3, 3, PAD, PAD], 4 * [PAD], 4 * [PAD]]
  # What the constraint leaves is certain.
  np.testing.assert_allclose(
    found["scores"], [[0, -np.inf, -np.inf]], atol=1e-6
  )
  short = _search(GARDEN_PATH, constraint=only, max_length=1)
  assert short["lengths"] == [[0]]
  assert short["scores"] == [[-np.inf]]


def test_logits_of_an_alphabet_are_enough():
  rng = np.random.default_rng(3)
  answers = [(3,), (3, 5), (5, 5, 7), (7, 7, 7), (5, 3)]
  trie = answer_trie(answers)
  letters = alphabet(trie, EOS)
  assert letters.tolist() == [EOS, 3, 5, 7]

  def few(tokens, t, model):
    logits, model = step(tokens, t, model)
    return logits[..., letters], model

  def search(step, model, alphabet=None):
    return beam_search(
      step,
      reorder,
      model,
      jnp.full(BATCH, BOS, jnp.int32),
      eos_id=EOS,
      pad_id=PAD,
      beam_size=5,
      num_best=5,
      length_limit=LIMIT,
      no_repeat_ngram=2,
      constraint=trie,
      vocab_size=CLASSES,
      forbidden=np.arange(CLASSES) == 4,
      alphabet=alphabet,
    )

  both = jax.jit(
    lambda model: (search(step, model), search(few, model, letters))
  )
  for _ in range(20):
    whole, part = jax.device_get(both(random_model(rng, beam=5)))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      whole,
      part,
    )
    # "7 7 7" contains "7 7" twice.
    assert (np.isfinite(part["scores"]).sum(axis=1) == 4).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_hypotheses_without_numbers_end_alone(sign):
  table = GARDEN_PATH.copy()
  table[3] = np.copysign(np.nan, sign)
  found = _search(table, num_best=2)
  assert found["ids"][0].tolist() == [[4, PAD, PAD, PAD], 4 * [PAD]]
  np.testing.assert_allclose(
    found["log_probs"], [[np.log(0.36), -np.inf]], rtol=1e-5
  )


def test_ngrams_may_be_longer_than_answers():
  free = _search(GARDEN_PATH, num_best=2)
  bound = _search(GARDEN_PATH, num_best=2, no_repeat_ngram=9)
  jax.tree.map(np.testing.assert_array_equal, bound, free)


def test_other_lengths_compile_nothing_and_each_step_is_one_pass():
  passes, traces = [], []

  def counted(tokens, t, cache):
    traces.append(t)
    jax.debug.callback(lambda t: passes.append(int(t)), t, ordered=True)
    return jnp.asarray(GARDEN_PATH)[tokens], cache

  def unused(cache, parents):
    pytest.fail("one hypothesis needs no order")

  @jax.jit
  def search(min_length, max_length):
    return beam_search(
      counted,
      unused,
      jnp.zeros(()),
      jnp.array([BOS, 3]),
      eos_id=EOS,
      pad_id=PAD,
      beam_size=1,
      length_limit=8,
      min_length=min_length,
      max_length=max_length,
    )

  search(np.int32(0), np.int32(1))
  traces.clear()
  for least, most in ((0, 0), (1, 5), (4, 8)):
    passes.clear()
    found = search(np.int32(least), np.int32(most))
    jax.effects_barrier()
    assert passes == list(range(int(found["steps"])))
    assert len(passes) >= least + 1
  assert not traces


def test_wrong_sizes_are_rejected():
  with pytest.raises(
    UserError, match=r"beam_size=5 exceeds the 4 tokens .* nearest: 4 \(--beam"
  ):
    _search(GARDEN_PATH, beam_size=5)
  with pytest.raises(UserError, match=r"nearest: 3 \(--beam_size\)"):
    _search(GARDEN_PATH, beam_size=4, vocab_size=4)
  with pytest.raises(UserError, match=r"num_best=3 exceeds .*=2; nearest: 2"):
    _search(GARDEN_PATH, num_best=3)
