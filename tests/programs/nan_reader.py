"""A data pipeline in which one record spoils its batch.

Records themselves cannot: their scores are checked.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from narvl_jax.data.batches.mixture import Draw
from narvl_jax.data.batches.readers import TrainReader

_read = TrainReader.__call__


def spoiled(entry: int, position: int) -> Callable[..., Any]:
  """Returns what to put in the place of `TrainReader.__call__`.

  Args:
    entry: number of the entry.
    position: of the record in the order of the entry; gets the weight NaN.
  """

  def read(self: TrainReader, draws: Sequence[Draw]) -> Any:
    batch, bad = _read(self, draws)
    assert isinstance(batch, dict)
    for row, draw in enumerate(draws):
      if (draw.entry, draw.position) == (entry, position):
        batch["confidence"][row] = math.nan
    return batch, bad

  return read
