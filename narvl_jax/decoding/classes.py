"""Ids with a meaning, and classes that are never predicted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.query_ctc.log_space import LOG_ZERO


@dataclasses.dataclass(frozen=True)
class Classes:
  """Ids with a meaning; hashable.

  Attributes:
    vocab_size: number of true classes; later ones are padding of the table.
    pad_id: fills the tails of texts and answers.
    eos_id: ends texts and answers.
    blank_id: CTC blank; None for an autoregressive model.
    forbidden: bool [vocab_size] as bytes, classes that answers must not
      contain; None if there are none, as the official checkpoints expect.
    bins: id of the first coordinate bin and their number; None without boxes.
  """

  vocab_size: int
  pad_id: int
  eos_id: int
  blank_id: int | None = None
  forbidden: bytes | None = None
  bins: tuple[int, int] | None = None

  @classmethod
  def of(
    cls,
    vocab_size: int,
    *,
    pad_id: int,
    eos_id: int = 2,
    blank_id: int | None = None,
    forbidden: np.ndarray | None = None,
    bins: tuple[int, int] | None = None,
  ) -> "Classes":
    """Packs the mask of forbidden classes, cut off at `vocab_size`."""
    packed = None
    if forbidden is not None:
      packed = np.asarray(forbidden[:vocab_size], bool).tobytes()
    return cls(vocab_size, pad_id, eos_id, blank_id, packed, bins)

  def mask(self) -> np.ndarray | None:
    """Returns the forbidden classes, bool [vocab_size]."""
    if self.forbidden is None:
      return None
    return np.frombuffer(self.forbidden, bool)


def never_predicted(
  classes: int, forbidden: np.ndarray | None, vocab_size: int | None
) -> np.ndarray | None:
  """Returns the mask bool [V] of forbidden classes and padding, None if empty.

  Args:
    classes: V, of the padded table.
    forbidden: bool [vocab_size]; None forbids nothing.
    vocab_size: number of true classes, None for all V.
  """
  size = classes if vocab_size is None else vocab_size
  if forbidden is None and size == classes:
    return None
  never = np.zeros(size, bool) if forbidden is None else forbidden
  return np.pad(never, (0, classes - size), constant_values=True)


def masked(logits: jax.Array, never: np.ndarray | None) -> jax.Array:
  """Returns float32 logits [..., V], -inf for classes in the mask bool [V]."""
  logits = logits.astype(jnp.float32)
  return logits if never is None else jnp.where(never, LOG_ZERO, logits)
