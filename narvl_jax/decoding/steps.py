"""Compiled programs from a batch to its answers."""

import functools
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

Decoded = dict[str, jax.Array]


class Inputs(NamedTuple):
  """Inputs of a reader besides the encoder's output.

  Attributes:
    text: int32 [B, T] source ids, right padded.
    merge_repeats: bool [B], whether equal neighbours are one token.
    lengths: int32 [2], least and most tokens of an answer, for autoregressive
      readers. They are traced, so that other lengths compile nothing.
    target: ids int32 [B, L], right padded, and lengths int32 [B] of the true
      answers; None if they are not scored.
  """

  text: jax.Array
  merge_repeats: jax.Array
  lengths: jax.Array
  target: tuple[jax.Array, jax.Array] | None = None


class Reader(Protocol):
  """Decodes the answers of an encoded batch; hashable.

  The result has at least ids int32 [B, M, L], lengths int32 [B, M] and
  log_probs float32 [B, M] of the M best answers, best first. If there are fewer
  than M answers, the rest have length 0. With targets it has target_log_prob
  float32 [B], of the true answers without a constraint.
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
    predict: (variables, image, text, image_mask, merge_repeats, lengths,
      target=None) -> result of the reader, in one program.
  """

  encode: Any
  decode: Any
  predict: Any


def make_steps(
  model: nn.Module,
  reader: Reader,
  rules: tuple[Any, ...] = (),
  rows_at_once: int = 0,
) -> Steps:
  """Returns the compiled steps of a model.

  Equal arguments return the same functions, so that nothing is compiled twice
  for one batch shape.

  Args:
    model: has a method `encode`, and the methods that the reader calls.
    rules: rules of `flax.linen.logical_axis_rules`; they split activations if
      the steps are called under `jax.set_mesh`.
    rows_at_once: number of rows that `predict` computes at a time, a divisor of
      the batch size; 0 for all. Matrix products add in an order that depends on
      the number of rows: with a fixed number, results do not depend on the
      batch size.
  """
  cached: Any = _make_steps
  return cached(model, reader, rules, rows_at_once)


@functools.lru_cache(maxsize=32)
def _make_steps(
  model: nn.Module, reader: Reader, rules: tuple[Any, ...], rows_at_once: int
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
    target: tuple[jax.Array, jax.Array] | None = None,
  ) -> Decoded:
    def predict_rows(rows: Any) -> Decoded:
      image, text, image_mask, merge_repeats, target = rows
      encoded = encode(variables, image, text, image_mask)
      inputs = Inputs(text, merge_repeats, lengths, target)
      return decode(variables, encoded, inputs)

    batch = image, text, image_mask, merge_repeats, target
    if not rows_at_once:
      return predict_rows(batch)
    parts = jax.tree.map(lambda x: _split(x, rows_at_once), batch)
    return jax.tree.map(_join, _map(predict_rows, parts))

  return Steps(jax.jit(encode), jax.jit(decode), jax.jit(predict))


def _map(function: Any, parts: Any) -> Any:
  """Returns the stacked results of a function of each part, as `lax.map`.

  The compiler sees at least two parts and does not know how many are computed.
  With one it would merge the body with its surroundings and round differently.
  """
  count = len(jax.tree.leaves(parts)[0])
  if count == 1:
    parts = jax.tree.map(lambda x: jnp.concatenate([x, x]), parts)

  def step(i: jax.Array, results: Any) -> Any:
    found = function(jax.tree.map(lambda x: x[i], parts))
    return jax.tree.map(lambda x, new: x.at[i].set(new), results, found)

  shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
  nothing = jax.tree.map(
    lambda x: jnp.zeros((max(count, 2), *x.shape), x.dtype), shapes
  )
  unknown = jax.lax.optimization_barrier(jnp.int32(count))
  results = jax.lax.fori_loop(0, unknown, step, nothing)
  return jax.tree.map(lambda x: x[:count], results)


def _split(x: jax.Array, rows: int) -> jax.Array:
  """Returns parts [B / rows, rows, ...] of an array [B, ...].

  A part has a row of each of `rows` equal blocks, which devices may hold.
  """
  return x.reshape(rows, -1, *x.shape[1:]).swapaxes(0, 1)


def _join(x: jax.Array) -> jax.Array:
  """Undoes `_split`; sums what was a number for each part."""
  if x.ndim == 1:
    return jnp.sum(x)
  return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
