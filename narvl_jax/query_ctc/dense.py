"""The head for whole logits [B, N, V]: their summary and gradient.

The only other array of the size of the logits is the gradient, which XLA may
write in their place. The classes may be split over a mesh axis. The
communication over it is [B, N] and [B, N, L+1] numbers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from narvl_jax.query_ctc.axes import Split
from narvl_jax.query_ctc.compact import LogitGradient, Summary
from narvl_jax.query_ctc.log_space import Normalizer, normalizer

# A sum of exponentials needs no shift if no term is above exp(_LARGE), so that
# it is finite, and if it is above _SMALL, so that underflow does not matter.
_LARGE = 60.0
_SMALL = 1e-20

# Number of true classes; later ones are padding.
Size = int | jax.Array


@dataclasses.dataclass(frozen=True)
class DenseHead:
  """A `compact.Head` whose input is logits [B, N, V] of any float dtype.

  Attributes:
    split: how the logits are split.
  """

  vocab_size: int
  split: Split

  def summarize(self, inputs: jax.Array, columns: jax.Array) -> Summary:
    """See `compact.Head`."""

    def local(logits: jax.Array, columns: jax.Array) -> Summary:
      classes = logits.shape[-1]
      size = self.split.true_classes(self.vocab_size, classes)
      columns = self.split.local_ids(columns, classes)
      part, total, gathered = jax.lax.platform_dependent(
        logits,
        columns,
        cpu=functools.partial(_summarize_by_query, vocab_size=size),
        default=functools.partial(_summarize, vocab_size=size),
      )
      if self.split.vocab is not None:
        here = columns < classes
        gathered = jnp.where(here[:, None, :], gathered, 0.0)
      total, gathered = self.split.sum_over_classes((total, gathered))
      return Summary(self.split.join(part), total, gathered)

    return self.split.run(
      local,
      inputs,
      columns,
      in_specs=(self.split.logits, self.split.rows),
      out_specs=self.split.rows,
    )

  def pull_back(self, inputs: jax.Array, gradient: LogitGradient) -> jax.Array:
    """Returns the gradient with the dtype of the logits."""

    def local(logits: jax.Array, gradient: LogitGradient) -> jax.Array:
      classes = logits.shape[-1]
      size = self.split.true_classes(self.vocab_size, classes)
      columns = self.split.local_ids(gradient.columns, classes)
      return _write_out(logits, gradient._replace(columns=columns), size)

    return self.split.run(
      local,
      inputs,
      gradient,
      in_specs=(self.split.logits, self.split.rows),
      out_specs=self.split.logits,
    )


def _summarize(
  logits: jax.Array,
  columns: jax.Array,
  *,
  vocab_size: Size,
  reduce: Callable[..., Any] = normalizer,
) -> tuple[Any, jax.Array, jax.Array]:
  """Returns the parts of a `Summary`, float32.

  Args:
    logits: [B, N, V].
    columns: int32 [B, L+1], at most V.
    reduce: reduction of float32 [B, N, V] over the last axis.

  Returns:
    The reduction and the sum over the true classes [B, N], and the logits at
    the columns [B, N, L+1], arbitrary for column V.
  """
  z = _true_classes(logits, vocab_size, -jnp.inf)
  total = jnp.sum(_true_classes(logits, vocab_size, 0.0), axis=-1)
  gathered = jax.vmap(lambda x, c: x.at[:, c].get(mode="clip"))(logits, columns)
  return reduce(z), total, gathered.astype(jnp.float32)


def _summarize_by_query(
  logits: jax.Array, columns: jax.Array, *, vocab_size: Size
) -> tuple[Normalizer, jax.Array, jax.Array]:
  """Like `_summarize`, one query at a time.

  A CPU stores the exponentials before it sums them; those of one query fit the
  cache. Since all reads are inside the loop, the gradient can also reuse the
  memory of the logits.
  """

  def scan(of_query: Callable[[jax.Array], Any]) -> Any:
    def step(_: None, query: jax.Array) -> tuple[None, Any]:
      row = jax.lax.dynamic_index_in_dim(bits, query, 1)
      return None, of_query(row.view(logits.dtype))

    bits = _as_bits(logits)
    _, out = jax.lax.scan(step, None, jnp.arange(logits.shape[1]))
    return jax.tree.map(lambda x: x[:, :, 0].swapaxes(0, 1), out)

  def safe() -> Normalizer:
    return scan(
      lambda row: normalizer(_true_classes(row, vocab_size, -jnp.inf))
    )

  # The maximum takes as long as all the rest, and is rarely needed.
  mass, total, gathered = scan(
    functools.partial(
      _summarize, columns=columns, vocab_size=vocab_size, reduce=_sum_exp
    )
  )
  plain = Normalizer(jnp.zeros_like(mass), jnp.log(mass))
  part = jax.lax.cond(jnp.all(mass > _SMALL), lambda: plain, safe)
  return part, total, gathered


def _sum_exp(z: jax.Array) -> jax.Array:
  """Returns the sum of exp(z) over classes, NaN if a term is above exp(_LARGE).

  On a CPU the select also keeps the exponential in a loop of XLA, which is
  faster than the library that XLA calls for sums.
  """
  return jnp.sum(jnp.where(z <= _LARGE, jnp.exp(z), jnp.nan), axis=-1)


def _true_classes(x: jax.Array, vocab_size: Size, fill: float) -> jax.Array:
  """Returns x [..., V] in float32, with `fill` in the padding."""
  x = x.astype(jnp.float32)
  if isinstance(vocab_size, int) and vocab_size == x.shape[-1]:
    return x
  return jnp.where(jnp.arange(x.shape[-1]) < vocab_size, x, fill)


def _write_out(
  logits: jax.Array, gradient: LogitGradient, vocab_size: Size
) -> jax.Array:
  """Returns the gradient with shape and dtype of the logits.

  Args:
    logits: [B, N, V].
    gradient: its compact form; columns V are not written.
  """
  scale = gradient.scale[:, None, None]
  offset = gradient.offset[:, None, None]
  z = jnp.where(gradient.live[:, None, None], logits.astype(jnp.float32), 0.0)
  normalizer = jax.tree.map(lambda x: x[:, :, None], gradient.normalizer)
  grad = scale * jnp.exp(normalizer.log_probs(z)) + offset
  grad = _true_classes(grad, vocab_size, 0.0)
  # Overwritten, not added: this rounds once. Columns of equal id all have the
  # value of the first.
  special = scale * jnp.exp(gradient.log_probs) + offset - gradient.taken
  special = jnp.take_along_axis(special, gradient.first[:, None, :], axis=-1)
  return _write(grad.astype(logits.dtype), gradient.columns, special)


def _write(x: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
  """Writes values [B, N, L+1] into x [B, N, V] at columns [B, L+1]."""
  bits = jax.vmap(lambda x, c, y: x.at[:, c].set(y, mode="drop"))(
    _as_bits(x), columns, _as_bits(values.astype(x.dtype))
  )
  return bits.view(x.dtype)


def _as_bits(x: jax.Array) -> jax.Array:
  """Returns half-precision floats as integers, for slices and scatters.

  For these, XLA's CPU backend would copy the whole array to float32.
  """
  return x.view(jnp.uint16) if x.dtype.itemsize == 2 else x
