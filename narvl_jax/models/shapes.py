"""Initial values and shapes of a model's variables."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def abstract_variables(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Any:
  """Returns shapes of the variables, boxed with their logical axis names."""
  initialize = initializer(model, image_size, text_length)
  key = jax.eval_shape(jax.random.key, 0)
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    # The type of a real key, so that the initialisation shares this trace.
    sharding = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding)
  return jax.eval_shape(initialize, key)


def initializer(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Callable[[jax.Array], Any]:
  """Returns a function key -> initial variables, boxed.

  Equal arguments give the same jitted function, so that `abstract_variables`
  and the initialisation share one trace, which takes a second or more.
  """
  # Models are frozen dataclasses, so they can be keys of the cache.
  key: Any = model
  return _initializer(key, image_size, text_length)


@functools.lru_cache(maxsize=8)
def _initializer(
  model: nn.Module, image_size: tuple[int, int], text_length: int
) -> Callable[[jax.Array], Any]:
  def initialize(key: jax.Array) -> Any:
    image = jnp.zeros((1, *image_size, 3), jnp.uint8)
    text = jnp.ones((1, text_length), jnp.int32)
    return model.init(key, image, text)

  # Inlined: a function of its own would be an obstacle to the compiler.
  return jax.jit(initialize, inline=True)
