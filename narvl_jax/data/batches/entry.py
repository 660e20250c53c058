"""One source of a training mixture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

WeightSchedule = float | Sequence[tuple[int, float]]


class MixtureEntry(NamedTuple):
  """One source of a mixture.

  Attributes:
    source: `Record`s with random access.
    weight: share relative to the other entries; or [(from_step, weight), ...]
      from step 0 for a share that changes during training.
    name: unique in the mixture; the order of the records depends on it.
  """

  source: Any
  task: str
  weight: WeightSchedule
  name: str
