"""Rules for the next token of an autoregressive decoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.decoding.constraint import Automaton, allowed_tokens


@dataclasses.dataclass(frozen=True)
class Rules:
  """Tokens that may follow.

  Constraint and forbidden classes are applied before the softmax: the allowed
  classes form a distribution of their own. Pad, lengths and n-grams are applied
  after it.

  Attributes:
    eos_id: ends an answer.
    pad_id: never predicted.
    min_length: int32 [B], tokens before eos is allowed.
    max_length: int32 [B], tokens after which only eos is allowed.
    no_repeat_ngram: no sequence of so many tokens occurs twice; 0 allows all.
    constraint: allowed answers, None for all.
    vocab_size: number of true classes, later ones are padding of the table;
      None for all.
    forbidden: bool [vocab_size], classes that are never predicted.
    alphabet: int32 [U], ascending, given with `vocab_size`. The logits are
      those of these tokens, and no other is predicted. None for all tokens.
  """

  eos_id: int
  pad_id: int
  min_length: jax.Array
  max_length: jax.Array
  no_repeat_ngram: int
  constraint: Automaton | None
  vocab_size: int | None
  forbidden: np.ndarray | jax.Array | None
  alphabet: np.ndarray | None = None

  def log_probs(
    self, logits: jax.Array, tokens: jax.Array, states: jax.Array, t: jax.Array
  ) -> jax.Array:
    """Returns float32 [B, K, V], -inf for tokens that must not follow.

    Args:
      logits: [B, K, V] of token t.
      tokens: int32 [B, K, 1 + G], first token and t generated ones.
      states: int32 [B, K], states of the constraint.
      t: int32, number of generated tokens.
    """
    classes = num_classes(logits, self.vocab_size, self.alphabet)
    allowed = allowed_classes(classes, self.vocab_size, self.forbidden)
    if self.constraint is not None:
      allowed &= allowed_tokens(self.constraint, states, classes, self.eos_id)
    ids = jnp.arange(classes)
    later = ids != self.pad_id
    early = (t < self.min_length)[:, None, None]
    late = (t >= self.max_length)[:, None, None]
    later &= ~jnp.where(ids == self.eos_id, early, late)
    if self.no_repeat_ngram:
      later &= ~_repeating(tokens, t, self.no_repeat_ngram, classes)
    if self.alphabet is not None:
      allowed, later = (x[..., self.alphabet] for x in (allowed, later))
    logits = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
    log_probs = jax.nn.log_softmax(logits)
    # NaN where all is forbidden; the comparison is false there.
    return jnp.where(later & (log_probs > -jnp.inf), log_probs, -jnp.inf)


def num_classes(
  logits: jax.Array, vocab_size: int | None, alphabet: np.ndarray | None
) -> int:
  """Returns V, the number of classes; with an alphabet, logits have fewer."""
  if alphabet is None:
    return logits.shape[-1]
  assert vocab_size is not None, "an alphabet needs vocab_size"
  return vocab_size


def allowed_classes(
  classes: int, vocab_size: int | None, forbidden: np.ndarray | jax.Array | None
) -> jax.Array:
  """Returns the mask bool [V] of classes neither padding nor forbidden.

  Args:
    classes: V, of the padded table.
    vocab_size: number of true classes; None for all V.
    forbidden: bool [vocab_size]; None forbids nothing.
  """
  size = classes if vocab_size is None else vocab_size
  never = jnp.zeros(size, bool) if forbidden is None else forbidden
  return ~jnp.pad(never, (0, classes - size), constant_values=True)


def _repeating(
  tokens: jax.Array, t: jax.Array, size: int, classes: int
) -> jax.Array:
  """Returns the mask bool [B, K, V] of tokens that would repeat an n-gram.

  Args:
    tokens: int32 [B, K, 1 + G], valid up to index t.
    t: int32.
    size: n, at least 1.
    classes: V.
  """
  mask = jnp.zeros((*tokens.shape[:2], classes), bool)
  count = tokens.shape[-1] - size + 1
  if count < 1:
    return mask
  # The last n - 1 tokens are compared with those from each place on.
  recent = t - size + 2
  same = jnp.arange(count) + size - 1 <= t
  same = jnp.broadcast_to(same, (*tokens.shape[:2], count))
  for i in range(size - 1):
    token = jax.lax.dynamic_index_in_dim(tokens, recent + i, axis=2)
    same &= tokens[..., i : i + count] == token
  b, k = jnp.indices(tokens.shape[:2])[..., None]
  return mask.at[b, k, tokens[..., size - 1 :]].max(same)
