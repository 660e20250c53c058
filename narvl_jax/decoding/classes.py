"""Which class is what, as programs need to know it."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Classes:
  """Ids with a meaning; hashable.

  Attributes:
    vocab_size: number of true classes, those after it pad the table.
    pad_id: fills the tails of texts and answers.
    eos_id: ends texts and answers.
    blank_id: of CTC; None for an autoregressive model.
    forbidden: bool [vocab_size] as bytes, classes that no answer may hold;
      None allows all, as the official checkpoints expect.
  """

  vocab_size: int
  pad_id: int
  eos_id: int
  blank_id: int | None = None
  forbidden: bytes | None = None

  @classmethod
  def of(
    cls,
    vocab_size: int,
    *,
    pad_id: int,
    eos_id: int = 2,
    blank_id: int | None = None,
    forbidden: np.ndarray | None = None,
  ) -> "Classes":
    """Packs a mask, of which classes beyond `vocab_size` are cut off."""
    packed = None
    if forbidden is not None:
      packed = np.asarray(forbidden[:vocab_size], bool).tobytes()
    return cls(vocab_size, pad_id, eos_id, blank_id, packed)

  def mask(self) -> np.ndarray | None:
    """Returns the forbidden classes, bool [vocab_size]."""
    if self.forbidden is None:
      return None
    return np.frombuffer(self.forbidden, bool)
