"""Compiled programs from a batch to its answers."""

import functools
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax

Decoded = dict[str, jax.Array]


class Inputs(NamedTuple):
  """Inputs of a reader besides the encoder's output.

  Attributes:
    text: int32 [B, T] source ids, right padded.
    merge_repeats: bool [B], whether equal neighbours are one token.
    lengths: int32 [2], least and most tokens of an answer, for autoregressive
      readers. They are traced, so that other lengths compile nothing.
  """

  text: jax.Array
  merge_repeats: jax.Array
  lengths: jax.Array


class Reader(Protocol):
  """Decodes the answers of an encoded batch; hashable.

  The result has at least ids int32 [B, M, L], lengths int32 [B, M] and
  log_probs float32 [B, M] of the M best answers, best first. If there are fewer
  than M answers, the rest have length 0.
  """

  def __call__(
    self, model: nn.Module, variables: Any, encoded: Any, inputs: Inputs
  ) -> Decoded:
    """Returns the answers, see the class."""
    ...

  def __hash__(self) -> int:
    """Equal readers share compiled programs."""
    ...


class Steps(NamedTuple):
  """Jitted functions of a model and a reader.

  Attributes:
    encode: (variables, image [B, H, W, 3], text, image_mask bool [B]) ->
      output of the encoder.
    decode: (variables, encoded, inputs) -> result of the reader.
    predict: (variables, image, text, image_mask, merge_repeats, lengths) ->
      result of the reader, in one program.
  """

  encode: Any
  decode: Any
  predict: Any


def make_steps(
  model: nn.Module, reader: Reader, rules: tuple[Any, ...] = ()
) -> Steps:
  """Returns the compiled steps of a model.

  Equal arguments return the same functions, so that nothing is compiled twice
  for one batch shape.

  Args:
    model: has a method `encode`, and the methods that the reader calls.
    rules: for `flax.linen.logical_axis_rules`; they split activations if the
      steps are called under `jax.set_mesh`.
  """
  cached: Any = _make_steps
  return cached(model, reader, rules)


@functools.lru_cache(maxsize=32)
def _make_steps(
  model: nn.Module, reader: Reader, rules: tuple[Any, ...]
) -> Steps:
  def encode(
    variables: Any, image: jax.Array, text: jax.Array, image_mask: jax.Array
  ) -> Any:
    with nn.logical_axis_rules(rules):
      return model.apply(
        variables, image, text, image_mask=image_mask, method="encode"
      )

  def decode(variables: Any, encoded: Any, inputs: Inputs) -> Decoded:
    with nn.logical_axis_rules(rules):
      return reader(model, variables, encoded, inputs)

  def predict(
    variables: Any,
    image: jax.Array,
    text: jax.Array,
    image_mask: jax.Array,
    merge_repeats: jax.Array,
    lengths: jax.Array,
  ) -> Decoded:
    encoded = encode(variables, image, text, image_mask)
    inputs = Inputs(text, merge_repeats, lengths)
    return decode(variables, encoded, inputs)

  return Steps(jax.jit(encode), jax.jit(decode), jax.jit(predict))
