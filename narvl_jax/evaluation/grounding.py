"""Metrics of grounding: Acc@0.5, Acc@0.75 and the mean IoU."""

import math

from narvl_jax.data.example import Box, Record
from narvl_jax.evaluation.metric import MeanMetric

_THRESHOLDS = {"acc@0.5": 0.5, "acc@0.75": 0.75}
# Area in square pixels below which a box has a size (COCO).
SIZES = {"small": 32**2, "medium": 96**2, "large": math.inf}


def box_iou(predicted: Box, target: Box) -> float:
  """Returns the intersection over union of two boxes, in [0, 1].

  Nothing is added to the union. The reference adds 1e-6, which its float32
  loses for every union above 32 square pixels.

  Args:
    predicted: x0, y0, x1, y1 in pixels. A box without area, with swapped
      corners or with a coordinate that is not finite has an IoU of 0.
    target: true box, in the same form.
  """
  if not all(map(math.isfinite, (*predicted, *target))):
    return 0.0
  width = min(predicted[2], target[2]) - max(predicted[0], target[0])
  height = min(predicted[3], target[3]) - max(predicted[1], target[1])
  if width <= 0 or height <= 0:
    return 0.0
  intersection = width * height
  union = _area(predicted) + _area(target) - intersection
  # Products of extreme coordinates are 0 or infinite.
  if not 0 < union < math.inf:
    return 0.0
  return min(intersection / union, 1.0)


def _area(box: Box) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])


def size_of(box: Box) -> str:
  """Returns the size class of COCO of a true box: a key of `SIZES`."""
  area = _area(box)
  return next((x for x, limit in SIZES.items() if area < limit), "large")


class BoxOverlap(MeanMetric):
  """Overlap of a box with the true one, in pixels of the original image.

  Boxes keep their full precision. A prediction without a box is all zero.
  """

  names = (*_THRESHOLDS, "mean_iou")

  def measure(
    self, example: Record, prediction: Box
  ) -> dict[str, float] | None:
    """Returns whether the IoU reaches each threshold, and the IoU."""
    if example.box is None:
      return None
    iou = box_iou(prediction, example.box)
    hits = {name: float(iou >= x) for name, x in _THRESHOLDS.items()}
    return {**hits, "mean_iou": iou}
