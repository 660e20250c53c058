"""The likelihood of a target by its places, for their posterior.

`optax.ctc_loss` has one number for all places of a label, this one for each.

Letters: b batch, n queries, l labels.
"""

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.log_space import LOG_ZERO, Pair, log_add


def log_likelihood(
  log_probs: Pair, labels: jax.Array, label_lengths: jax.Array
) -> jax.Array:
  """Returns the log-likelihood of the target, by the forward variables.

  Its gradient with respect to `log_probs.high` is the posterior: the
  probability that a query says blank, or the label of a place.
  Log-probabilities need not be normalised. They may have any magnitude of
  which the sum over the queries is finite.

  Args:
    log_probs: [B, N, L+1], blank first, then the places of the target; two
      places with one label have each their own.
    labels: [B, L] integers.
    label_lengths: [B] integers in 0..L.

  Returns:
    float32 [B]; -inf if no alignment is possible.

  Source: Graves et al. 2006, section 4.1.
  """
  # From one label straight to the next; equal ones need a blank between.
  differs = labels[:, 1:] != labels[:, :-1]

  def shift(x: jax.Array, zero: float) -> jax.Array:
    """Moves a place on; nothing comes before the first."""
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=zero)

  def onward(x: jax.Array, zero: float) -> jax.Array:
    x = jnp.where(differs, x[:, :-1], zero)
    return shift(x, zero)[:, : labels.shape[1]]

  def step(
    state: tuple[Pair, Pair], query: Pair
  ) -> tuple[tuple[Pair, Pair], None]:
    # Of l labels said so far: the last query said blank, or the label itself.
    blank, said = state
    after = log_add(blank, said.map(shift))
    stay = log_add(said, blank.map(lambda x, _: x[:, :-1]))
    label = log_add(stay, said.map(onward))
    of_blank = query.map(lambda x, _: x[:, :1])
    of_label = query.map(lambda x, _: x[:, 1:])
    return (after + of_blank, label + of_label), None

  blank = Pair.of(jnp.full_like(log_probs.high[:, 0], LOG_ZERO))
  said = blank.map(lambda x, _: x[:, 1:])
  blank = blank._replace(high=blank.high.at[:, 0].set(0.0))
  by_query = log_probs.map(lambda x, _: x.swapaxes(0, 1))
  (blank, said), _ = jax.lax.scan(step, (blank, said), by_query)
  ends = log_add(blank, said.map(shift)).high
  return jnp.take_along_axis(ends, label_lengths[:, None], axis=1)[:, 0]
