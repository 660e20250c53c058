"""A data pipeline in which one record makes its batch give NaN.

A record itself cannot, since its scores are checked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from narvl_jax.data.batches.mixture import Draw
from narvl_jax.data.batches.readers import TrainReader

_read = TrainReader.__call__


def spoiled(entry: int, position: int) -> Callable[..., Any]:
  """Returns a replacement for `TrainReader.__call__`.

  Args:
    entry: index of the entry.
    position: in the order of the entry; this record gets the weight NaN.
  """

  def read(self: TrainReader, draws: Sequence[Draw]) -> Any:
    batch, bad = _read(self, draws)
    assert isinstance(batch, dict)
    for row, draw in enumerate(draws):
      if (draw.entry, draw.position) == (entry, position):
        batch["confidence"][row] = math.nan
    return batch, bad

  return read
