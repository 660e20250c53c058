"""Decoding token by token with a cache equals one pass over all tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.models import Autoregressive, cached_decoder
from narvl_jax.models.autoregressive import Prompt
from tests.models import small
from tests.models.small import B
from tests.models.test_autoregressive import CONFIG, PAD

MODEL = Autoregressive(CONFIG)
HYPOTHESES, NEW = 2, 4
PROMPT_LENGTHS = np.array([5, 3, 1])


@pytest.fixture(scope="module")
def variables() -> Any:
  return small.variables(CONFIG)


@pytest.fixture(scope="module")
def encoded(variables: Any) -> Any:
  encode = functools.partial(MODEL.apply, method="encode")
  return jax.jit(encode)(variables, small.image(), small.text())


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
  """Prompts and generated tokens [B, K, 5 + NEW], without padding."""
  rng = np.random.default_rng(2)
  ids = rng.integers(4, CONFIG.vocab_size, (B, HYPOTHESES, 5 + NEW))
  ids[:, 1:, :5] = ids[:, :1, :5]
  return ids.astype(np.int32)


def start(variables: Any, encoded: Any, tokens: np.ndarray) -> Any:
  """The cache behind all but the last token of every prompt."""
  ids = np.where(np.arange(5) < PROMPT_LENGTHS[:, None], tokens[:, 0, :5], PAD)
  return cached_decoder.start_cache(
    CONFIG,
    layers(variables),
    encoded,
    variables["params"]["embed_tokens"],
    Prompt(jnp.asarray(ids), jnp.asarray(PROMPT_LENGTHS)),
    hypotheses=HYPOTHESES,
    length_limit=NEW,
  )


def layers(variables: Any) -> Any:
  params = variables["params"]["decoder"]
  return cached_decoder.split_layers(params, CONFIG.decoder_layers)


@jax.jit
def extend(variables: Any, cache: Any, tokens: Any, t: Any) -> Any:
  table = variables["params"]["embed_tokens"]
  return cached_decoder.extend(
    CONFIG, layers(variables), cache, table, tokens, t
  )


def new_tokens(tokens: np.ndarray) -> np.ndarray:
  """The last token of the prompt and those after it, [B, K, NEW]."""
  first = PROMPT_LENGTHS[:, None] - 1 + np.arange(NEW)
  return np.take_along_axis(tokens, first[:, None], axis=2)


@pytest.fixture(scope="module")
def expected(variables: Any, encoded: Any, tokens: np.ndarray) -> np.ndarray:
  """States [B, K, NEW, D] of the decoder that sees all tokens at once."""
  decode = jax.jit(
    functools.partial(MODEL.apply, method="decode"),
  )
  states = []
  for k in range(HYPOTHESES):
    full = np.asarray(decode(variables, encoded, tokens[:, k, :-1]))
    places = PROMPT_LENGTHS[:, None] - 1 + np.arange(NEW)
    states.append(np.take_along_axis(full, places[..., None], axis=1))
  return np.stack(states, axis=1)


def test_step_by_step(
  variables: Any, encoded: Any, tokens: np.ndarray, expected: np.ndarray
) -> None:
  cache = start(variables, encoded, tokens)
  for t, column in enumerate(np.moveaxis(new_tokens(tokens), 2, 0)):
    states, cache = extend(variables, cache, column[..., None], t)
    np.testing.assert_allclose(states[:, :, 0], expected[:, :, t], atol=1e-5)


def test_many_tokens_at_once(
  variables: Any, encoded: Any, tokens: np.ndarray, expected: np.ndarray
) -> None:
  cache = start(variables, encoded, tokens)
  states, _ = extend(variables, cache, new_tokens(tokens), 0)
  np.testing.assert_allclose(states, expected, atol=1e-5)


def test_hypotheses_continue_their_parents(
  variables: Any, encoded: Any, tokens: np.ndarray, expected: np.ndarray
) -> None:
  cache = start(variables, encoded, tokens)
  said = new_tokens(tokens)
  _, cache = extend(variables, cache, said[..., :3], 0)
  parents = np.array([[1, 0], [1, 1], [0, 0]])
  cache = cached_decoder.reorder(cache, jnp.asarray(parents))
  # Each continues like its parent.
  last = np.take_along_axis(said[..., 3:], parents[..., None], axis=1)
  states, _ = extend(variables, cache, last, 3)
  moved = np.take_along_axis(expected[:, :, 3], parents[..., None], axis=1)
  np.testing.assert_allclose(states[:, :, 0], moved, atol=1e-5)


def test_hypotheses_share_prompt_and_memory(
  variables: Any, encoded: Any, tokens: np.ndarray
) -> None:
  cache = jax.eval_shape(lambda: start(variables, encoded, tokens))
  heads = (CONFIG.num_heads, CONFIG.head_width)
  for layer in cache.layers:
    assert layer.memory.key.shape == (B, *heads, encoded.out.shape[1])
    assert layer.prompt.key.shape == (B, 4, *heads)
    assert layer.generated.key.shape == (B, HYPOTHESES, NEW, *heads)


def test_too_long_for_the_positions(variables: Any, encoded: Any) -> None:
  prompt = Prompt(jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32))
  with pytest.raises(UserError, match=r"decoder input of 25 tokens .* exceeds"):
    cached_decoder.start_cache(
      CONFIG,
      layers(variables),
      encoded,
      variables["params"]["embed_tokens"],
      prompt,
      hypotheses=1,
      length_limit=25,
    )
