"""Sums of probabilities that are stored as logarithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The logarithm of zero. A finite number would not do: a logit may have any
# magnitude, and an unlikely alignment is not an impossible one.
LOG_ZERO = -np.inf
# Log-probability in results where there is no answer: finite, so that it can be
# averaged and written as JSON.
NO_ANSWER = -1e9


class Pair(NamedTuple):
  """A number as an unevaluated sum of two float32, `low` far below `high`.

  Log-likelihoods of alignments may be millions and differ by a few units,
  which one float32 does not resolve. Gradients flow through `high`.

  Attributes:
    high: float32 [...]; may be -inf or NaN.
    low: float32 [...], finite.
  """

  high: jax.Array
  low: jax.Array

  @classmethod
  def of(cls, x: jax.Array) -> Pair:
    """Returns the pair of a float32 array."""
    return cls(x, jnp.zeros_like(x))

  @classmethod
  def sum(cls, a: jax.Array, b: jax.Array) -> Pair:
    """Returns a + b without rounding (Knuth's TwoSum)."""
    high = a + b
    part = high - a
    low = jax.lax.stop_gradient((a - (high - part)) + (b - part))
    return cls(high, jnp.where(jnp.isfinite(high), low, 0.0))

  def __add__(self, other: Pair) -> Pair:
    high, low = Pair.sum(self.high, other.high)
    return Pair.sum(high, low + self.low + other.low)

  def map(self, function: Callable[[jax.Array, float], jax.Array]) -> Pair:
    """Applies a function of (array, fill) to both parts.

    The fill is the logarithm of zero: -inf for `high`, 0 for `low`.
    """
    return Pair(function(self.high, LOG_ZERO), function(self.low, 0.0))


@jax.custom_jvp
def log_add(a: Pair, b: Pair) -> Pair:
  """Returns log(exp(a) + exp(b)).

  Where both are -inf, the gradient of `jnp.logaddexp` is NaN; this one is not.
  The weights of its gradient sum to 1 for values of any magnitude.

  Args:
    a: below +inf; NaN gives NaN.
    b: like a.
  """
  gap = _difference(a, b)
  high = jnp.where(gap >= 0, a.high, b.high)
  # A comparison with NaN is false and would drop it.
  high = jnp.where(jnp.isnan(gap), gap, high)
  low = jnp.where(gap >= 0, a.low, b.low)
  return Pair.sum(high, low + jnp.log1p(jnp.exp(-jnp.abs(gap))))


@log_add.defjvp
def _log_add_jvp(
  primals: tuple[Pair, Pair], tangents: tuple[Pair, Pair]
) -> tuple[Pair, Pair]:
  (a, b), (da, db) = primals, tangents
  gap = _difference(a, b)
  change = jax.nn.sigmoid(gap) * da.high + jax.nn.sigmoid(-gap) * db.high
  return log_add(a, b), Pair.of(change)


def _difference(a: Pair, b: Pair) -> jax.Array:
  """Returns a - b, 0 if both are -inf."""
  high = jnp.where(a.high == b.high, 0.0, a.high - b.high)
  return high + (a.low - b.low)


class Normalizer(NamedTuple):
  """A logsumexp over classes as the unevaluated sum `shift` + `log_mass`.

  For large logits the sum itself would lose `log_mass` to rounding.

  Attributes:
    shift: float32 [...], near the largest logit; -inf if there is none.
    log_mass: float32 [...], logsumexp of the logits minus `shift`.
  """

  shift: jax.Array
  log_mass: jax.Array

  def log_probs(self, logits: jax.Array) -> jax.Array:
    """Returns the log-probabilities of logits that broadcast to [...]."""
    return (logits - self.shift) - self.log_mass

  def precise_log_probs(self, logits: jax.Array) -> Pair:
    """Like `log_probs`, with the rounding errors of both differences."""
    return Pair.sum(logits, -self.shift) + Pair.of(-self.log_mass)


def normalizer(logits: jax.Array) -> Normalizer:
  """Returns the normalizer of float32 logits along the last axis.

  NaN or +inf among the logits make `log_mass` NaN.
  """
  shift = jnp.max(logits, axis=-1)
  mass = jnp.exp(logits - zero_if_none(shift)[..., None])
  return Normalizer(shift, jnp.log(jnp.sum(mass, axis=-1)))


def zero_if_none(shift: jax.Array) -> jax.Array:
  """Returns the shift, 0 for -inf, so that it can be subtracted from -inf."""
  return jnp.where(shift == LOG_ZERO, 0.0, shift)


def show_no_answer(scores: jax.Array) -> jax.Array:
  """Returns scores [..., M] with `NO_ANSWER`, or less, in place of -inf.

  The replacement is below all other scores along the last axis, so that it
  does not change their order.
  """
  finite = jnp.where(jnp.isfinite(scores), scores, 0.0)
  lowest = jnp.minimum(NO_ANSWER, 2.0 * jnp.min(finite, -1, keepdims=True))
  return jnp.where(scores == LOG_ZERO, lowest, scores)
