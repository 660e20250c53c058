"""Readers of both models: one form of result, however it was decoded."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.decoding import (
  AutoregressiveReader,
  Classes,
  Decoding,
  Inputs,
  ParallelReader,
  Steps,
  make_steps,
  prepare_variables,
)
from narvl_jax.decoding.answers import AnswerSet, pad_answers
from narvl_jax.errors import UserError
from narvl_jax.models import NARVL, Autoregressive
from tests.models import small
from tests.models.small import B, N
from tests.models.test_autoregressive import CONFIG

PAD, EOS, LIMIT = 1, 2, 5
CLASSES = Classes.of(CONFIG.vocab_size, pad_id=PAD, eos_id=EOS)
ANSWERS = AnswerSet("vqa", sequences=((7,), (7, 8), (9, 10, 11), (12,)))
MODEL = Autoregressive(CONFIG)


@pytest.fixture(scope="module")
def variables() -> Any:
  return small.variables(CONFIG)


def inputs(least: int = 0, most: int = LIMIT) -> Inputs:
  lengths = np.array([least, most], np.int32)
  return Inputs(small.text(), jnp.zeros(B, bool), jnp.asarray(lengths))


@functools.cache
def steps(prompted: bool, decoding: Decoding) -> Steps:
  reader = AutoregressiveReader(
    CLASSES, decoding, LIMIT, prompted, ANSWERS, group_size=3
  )
  return make_steps(MODEL, reader)


def decode(variables: Any, prompted: bool, decoding: Decoding) -> Any:
  made = steps(prompted, decoding)
  prepared = prepare_variables(MODEL, variables)
  mask = np.ones(B, bool)
  encoded = made.encode(prepared, small.image(), small.text(), mask)
  return jax.device_get(made.decode(prepared, encoded, inputs()))


@jax.jit
def full_pass(variables: Any, tokens: jax.Array) -> jax.Array:
  """Log-probabilities after every token, without a cache."""
  logits, _ = MODEL.apply(variables, small.image(), small.text(), tokens)  # pyright: ignore
  return jax.nn.log_softmax(logits)


def prompts(prompted: bool) -> list[list[int]]:
  """The first input of the decoder: bos, or the source without eos."""
  rows = np.asarray(small.text()).tolist()
  if not prompted:
    return [row[:1] for row in rows]
  return [[i for i in row if i not in (PAD, EOS)] for row in rows]


def log_probs_after(variables: Any, rows: list[list[int]]) -> np.ndarray:
  """Logits of all positions of rows of any length, [B, 11, V]."""
  padded = np.full((B, 11), PAD, np.int32)
  for target, row in zip(padded, rows, strict=True):
    target[: len(row)] = row
  return np.asarray(full_pass(variables, padded))


@pytest.mark.parametrize("prompted", [False, True])
def test_greedy_equals_a_loop_of_full_passes(
  variables: Any, prompted: bool
) -> None:
  found = decode(variables, prompted, Decoding())
  starts = prompts(prompted)
  rows = [list(row) for row in starts]
  total, done = np.zeros(B), np.zeros(B, bool)
  for t in range(LIMIT + 1):
    log_probs = log_probs_after(variables, rows)
    for b, row in enumerate(rows):
      if done[b]:
        continue
      last = log_probs[b, len(row) - 1].copy()
      last[PAD] = -np.inf
      token = EOS if t == LIMIT else int(last.argmax())
      total[b] += last[token]
      row.append(token)
      done[b] = token == EOS
  for b, row in enumerate(rows):
    said = row[len(starts[b]) : -1]
    assert found["ids"][b, 0, : found["lengths"][b, 0]].tolist() == said
    assert found["log_probs"][b, 0] == pytest.approx(total[b], abs=1e-4)
  assert found["steps"] == found["lengths"].max() + 1


def test_candidates_equal_teacher_forcing(variables: Any) -> None:
  found = decode(variables, True, Decoding("candidates", num_best=4))
  scores = np.zeros((B, 4))
  starts = prompts(True)
  trie = [(*answer, EOS) for answer in ANSWERS.sequences]
  for c, answer in enumerate(trie):
    rows = [start + list(answer[:-1]) for start in starts]
    log_probs = log_probs_after(variables, rows)
    for b, start in enumerate(starts):
      for place, token in enumerate(answer):
        # What may follow, and nothing else, shares the probability.
        allowed = [
          other[place]
          for other in trie
          if other[:place] == answer[:place] and len(other) > place
        ]
        here = log_probs[b, len(start) - 1 + place]
        mass = np.log(np.exp(here[sorted(set(allowed))]).sum())
        scores[b, c] += here[token] - mass
  order = np.argsort(-scores, axis=1)
  ids, lengths = pad_answers(ANSWERS, PAD)
  np.testing.assert_array_equal(found["ids"], ids[order])
  np.testing.assert_array_equal(found["lengths"], lengths[order])
  np.testing.assert_allclose(
    found["log_probs"], np.take_along_axis(scores, order, 1), atol=1e-4
  )
  # Four candidates, three at a time.
  assert found["steps"] == 2


def test_constrained_beam_finds_the_best_candidates(variables: Any) -> None:
  wide = Decoding(
    "beam", constrained=True, beam_size=4, num_best=4, normalize=False
  )
  found = decode(variables, True, wide)
  scored = decode(variables, True, Decoding("candidates", num_best=4))
  np.testing.assert_allclose(found["log_probs"], scored["log_probs"], atol=1e-4)
  np.testing.assert_array_equal(found["ids"][..., :3], scored["ids"])


def test_other_lengths_compile_nothing(variables: Any) -> None:
  made = steps(False, Decoding("beam", beam_size=2, num_best=2))
  prepared = prepare_variables(MODEL, variables)
  mask = np.ones(B, bool)
  encoded = made.encode(prepared, small.image(), small.text(), mask)
  for length in (1, 3, 5):
    found = made.decode(prepared, encoded, inputs(length, length))
    np.testing.assert_array_equal(found["lengths"], np.full((B, 2), length))
    assert found["steps"] == length + 1
  assert made.decode._cache_size() == 1
  scores = np.asarray(found["scores"])
  assert np.all(scores[:, 0] >= scores[:, 1])


@functools.cache
def parallel(decoding: Decoding, answers: AnswerSet | None) -> Any:
  classes = Classes.of(small.V, pad_id=PAD, blank_id=small.V - 1)
  made = make_steps(
    NARVL(small.CONFIG), ParallelReader(classes, decoding, answers)
  )
  mask = np.ones(B, bool)
  variables = small.variables()
  encoded = made.encode(variables, small.image(), small.text(), mask)
  return jax.device_get(made.decode(variables, encoded, inputs()))


@pytest.mark.parametrize(
  ("decoding", "answers", "width", "length"),
  [
    (Decoding(), None, 1, N),
    (Decoding("beam", beam_size=8, num_best=3), None, 3, N),
    (Decoding(constrained=True), ANSWERS, 1, N),
    (
      Decoding("beam", constrained=True, beam_size=8, num_best=3),
      ANSWERS,
      3,
      N,
    ),
    (Decoding("candidates", num_best=3), ANSWERS, 3, 3),
  ],
)
def test_results_of_the_parallel_decoder(
  decoding: Decoding, answers: AnswerSet | None, width: int, length: int
) -> None:
  found = parallel(decoding, answers)
  assert found["ids"].shape == (B, width, length)
  assert found["lengths"].shape == found["log_probs"].shape == (B, width)
  assert np.all(np.diff(found["log_probs"], axis=1) <= 0)
  for ids, size in zip(
    found["ids"].reshape(-1, length), found["lengths"].reshape(-1), strict=True
  ):
    assert set(ids[size:].tolist()) <= {PAD}
    if answers is not None:
      assert tuple(ids[:size].tolist()) in answers.sequences


def test_beam_and_candidates_find_the_same_best_answer() -> None:
  beam = parallel(
    Decoding("beam", constrained=True, beam_size=8, num_best=3), ANSWERS
  )
  scored = parallel(Decoding("candidates", num_best=3), ANSWERS)
  np.testing.assert_allclose(
    beam["log_probs"], scored["log_probs"], rtol=1e-4, atol=1e-4
  )


def test_free_choices_are_no_candidates() -> None:
  free = AnswerSet("grounding", tokens=(4, 5), count=2)
  with pytest.raises(UserError, match="grounding has no list of answers"):
    pad_answers(free, PAD)


def test_answers_end_at_eos() -> None:
  answers = AnswerSet("vqa", sequences=((7,), (8, 9)), then=(EOS,))
  ids, lengths = pad_answers(answers, PAD)
  np.testing.assert_array_equal(ids, [[7, EOS, PAD], [8, 9, EOS]])
  np.testing.assert_array_equal(lengths, [2, 3])
  assert len(answers.automaton().token) == 5
