"""What every autoregressive model promises: causality, padding, prompts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.models import NARVL, Autoregressive, make_model
from narvl_jax.models.autoregressive import (
  BOS_ID,
  Prompt,
  make_prompt,
  teacher_forcing,
)
from tests.models import small
from tests.models.small import IMAGE_TOKENS, B, T

PAD = 1
CONFIG = dataclasses.replace(
  small.CONFIG, decoder="autoregressive", vocab_size=small.V - 1
)
V = CONFIG.vocab_size
# A row of each length; the tokens are all different.
INPUT = np.array(
  [
    [BOS_ID, 10, 11, 12, 13, 14],
    [BOS_ID, 20, 21, 22, PAD, PAD],
    [BOS_ID, PAD, PAD, PAD, PAD, PAD],
  ]
)
LENGTHS = (6, 4, 1)
L = INPUT.shape[1]


@pytest.fixture(scope="module")
def variables() -> small.Variables:
  return small.variables(CONFIG)


@jax.jit
def apply(variables: Any, text: Any, tokens: Any) -> Any:
  """Logits and intermediates."""
  return Autoregressive(CONFIG).apply(variables, small.image(), text, tokens)


@pytest.fixture(scope="module")
def logits(variables: small.Variables) -> np.ndarray:
  return np.asarray(apply(variables, small.text(), INPUT)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types_of_the_outputs(dtype: Any) -> None:
  config = dataclasses.replace(CONFIG, dtype=dtype)
  logits, aux = jax.eval_shape(
    lambda v, x, text, tokens: Autoregressive(config).apply(v, x, text, tokens),
    small.shapes(config),
    small.image(),
    small.text(),
    INPUT,
  )
  assert (logits.shape, logits.dtype) == ((B, L, V), jnp.float32)
  length = IMAGE_TOKENS + T
  assert {k: (x.shape, x.dtype) for k, x in aux.items()} == {
    "image_features": ((B, 2, 3, 64), dtype),
    "encoder_out": ((B, length, 32), dtype),
    "encoder_mask": ((B, length), bool),
    "position_embeddings": ((length, 32), dtype),
    "decoder_out": ((B, L, 32), dtype),
  }


def test_parameters_are_those_of_narvl_but_the_queries() -> None:
  ours = small.flat(small.shapes(CONFIG))
  theirs = small.flat(small.shapes(small.CONFIG))
  queries = ("params", "decoder", "query_embed")
  assert set(theirs) - set(ours) == {queries}
  assert set(ours) <= set(theirs)


def test_the_config_selects_the_model() -> None:
  assert type(make_model(CONFIG)) is Autoregressive
  assert type(make_model(small.CONFIG)) is NARVL


@pytest.mark.parametrize("place", range(1, L))
def test_later_tokens_are_not_seen(
  variables: small.Variables, logits: np.ndarray, place: int
) -> None:
  changed = INPUT.copy()
  changed[0, place] = 99
  got = np.asarray(apply(variables, small.text(), changed)[0])
  np.testing.assert_array_equal(got[0, :place], logits[0, :place])
  # From there on every output sees the change.
  difference = np.abs(got[0, place:] - logits[0, place:]).max(-1)
  assert (difference > 1e-3).all()
  np.testing.assert_array_equal(got[1:], logits[1:])


def test_padding_of_the_input_does_not_matter(
  variables: small.Variables, logits: np.ndarray
) -> None:
  """More of it, or none: each row alone."""
  for row, length in enumerate(LENGTHS):
    alone = np.full((B, length), 50)
    alone[row] = INPUT[row, :length]
    got, _ = apply(variables, small.text(), alone)
    np.testing.assert_allclose(
      got[row], logits[row, :length], rtol=0, atol=2e-5
    )


def test_padding_is_not_attended_to(
  variables: small.Variables, logits: np.ndarray
) -> None:
  """Behind padding the decoder sees just what comes before it."""
  inputs = jnp.asarray(INPUT)
  holes = inputs.at[0, 2:4].set(PAD)
  table = variables["params"]["embed_tokens"].copy()
  table[PAD] += 1.0
  spoilt = {"params": {**variables["params"], "embed_tokens": table}}
  before, after = (
    apply(v, small.text(), holes)[0] for v in (variables, spoilt)
  )
  # The row of pad itself is projected to.
  others = np.arange(V) != PAD
  np.testing.assert_array_equal(
    np.asarray(before)[0, 4:, others], np.asarray(after)[0, 4:, others]
  )
  assert np.abs(np.asarray(before)[0, 4:] - logits[0, 4:]).max() > 1e-3


def test_padding_of_the_text_does_not_matter(
  variables: small.Variables, logits: np.ndarray
) -> None:
  got, _ = apply(variables, small.text(T + 9), INPUT)
  np.testing.assert_allclose(got, logits, rtol=0, atol=2e-5)


def test_without_an_input_the_decoder_reads_bos(
  variables: small.Variables, logits: np.ndarray
) -> None:
  got, _ = apply(variables, small.text(), None)
  assert got.shape == (B, 1, V)
  np.testing.assert_allclose(got[:, 0], logits[:, 0], rtol=0, atol=2e-5)


def test_input_that_exceeds_the_positions(variables: small.Variables) -> None:
  tokens = np.zeros((B, 25), np.int32)
  with pytest.raises(
    UserError,
    match=r"a decoder input of 25 tokens \(prompt and answer\) exceeds"
    r" model.max_text_positions=24 \(--config.model.max_text_positions=25",
  ):
    apply(variables, small.text(), tokens)
  # As many as there are rows.
  logits, _ = jax.eval_shape(apply, variables, small.text(), tokens[:, :24])
  assert logits.shape == (B, 24, V)


# Prompts and targets.

TEXT = jnp.array([[0, 7, 8, 9, 2], [0, 7, 2, 1, 1]])


def same(actual: Any, expected: Any) -> None:
  np.testing.assert_array_equal(actual, np.array(expected))


def test_prompt_of_bos_alone() -> None:
  prompt = make_prompt(TEXT, False, PAD)
  same(prompt.ids, [[0], [0]])
  same(prompt.length, [1, 1])


def test_prompt_of_the_source() -> None:
  prompt = make_prompt(TEXT, True, PAD)
  same(prompt.ids, [[0, 7, 8, 9], [0, 7, 1, 1]])
  same(prompt.length, [4, 2])


def test_prompt_of_some_examples() -> None:
  prompt = make_prompt(TEXT, jnp.array([False, True]), PAD)
  same(prompt.ids, [[0, 1, 1, 1], [0, 7, 1, 1]])
  same(prompt.length, [1, 2])


def test_prompt_of_rows_that_only_fill_the_batch() -> None:
  """They are all padding; something must be there to start from."""
  prompt = make_prompt(jnp.ones((1, 5), jnp.int32), True, PAD)
  same(prompt.length, [1])


def test_teacher_forcing_after_bos() -> None:
  labels = jnp.array([[30, 31, 2], [40, 2, 1]])
  prompt = make_prompt(TEXT, False, PAD)
  tokens, places = teacher_forcing(prompt, labels, jnp.array([3, 2]), PAD)
  same(tokens, [[0, 30, 31], [0, 40, 1]])
  same(places, [[0, 1, 2], [0, 1, 2]])


def test_teacher_forcing_after_the_source() -> None:
  labels = jnp.array([[30, 31, 2], [40, 2, 1]])
  prompt = make_prompt(TEXT, True, PAD)
  tokens, places = teacher_forcing(prompt, labels, jnp.array([3, 2]), PAD)
  same(tokens, [[0, 7, 8, 9, 30, 31], [0, 7, 40, 1, 1, 1]])
  # Where the last token of the prompt stands, the first label is predicted.
  same(places, [[3, 4, 5], [1, 2, 3]])


@pytest.mark.parametrize("prompted", [False, True])
def test_each_label_is_predicted_from_those_before_it(prompted: bool) -> None:
  """By random lengths."""
  rng = np.random.default_rng(0)
  labels = rng.integers(100, 200, (8, 6))
  label_lengths = rng.integers(1, 7, 8)
  text = rng.integers(10, 90, (8, 5))
  text[np.arange(5) >= rng.integers(2, 6, (8, 1))] = PAD
  prompt = make_prompt(jnp.asarray(text), prompted, PAD)
  tokens, places = teacher_forcing(
    Prompt(*prompt), jnp.asarray(labels), jnp.asarray(label_lengths), PAD
  )
  for row, count in enumerate(label_lengths):
    start = prompt.ids[row, : prompt.length[row]].tolist()
    for i in range(count):
      seen = tokens[row, : places[row, i] + 1].tolist()
      assert seen == start + labels[row, :i].tolist()
    whole = len(start) + count - 1
    assert (np.asarray(tokens[row, whole:]) == PAD).all()
