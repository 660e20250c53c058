"""Shapes of a model's variables, without making an array."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def abstract_variables(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Any:
  """Returns shapes of the variables, still boxed with their axis names.

  Tracing a model takes a second or more, so they are remembered.
  """
  # Models are frozen, so they can be a key, which their type does not tell.
  key: Any = model
  return _abstract_variables(key, image_size, text_length)


@functools.lru_cache(maxsize=8)
def _abstract_variables(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Any:
  return jax.eval_shape(initializer(model, image_size, text_length), _KEY_SPEC)


_KEY_SPEC = jax.eval_shape(lambda: jax.random.key(0))


def initializer(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Callable[[jax.Array], Any]:
  """Returns the function key -> freshly initialised variables, boxed."""

  def initialize(key: jax.Array) -> Any:
    image = jnp.zeros((1, *image_size, 3), jnp.uint8)
    text = jnp.ones((1, text_length), jnp.int32)
    return model.init(key, image, text)

  return initialize
