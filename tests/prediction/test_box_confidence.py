"""The probability of overlap against enumeration of all boxes."""

import itertools

import numpy as np
import pytest

from narvl_jax.data.example import Box
from narvl_jax.evaluation.grounding import box_iou
from narvl_jax.prediction.box_confidence import probability_of_overlap

BINS = 6


def brute_force(probs: np.ndarray, box: Box) -> float:
  every = range(BINS)
  return sum(
    float(np.prod(probs[range(4), other]))
    for other in itertools.product(every, every, every, every)
    if box_iou(other, box) >= 0.5
  )


@pytest.mark.parametrize("box", [(0, 1, 5, 4), (1, 1, 3, 5), (2, 0, 3, 1)])
@pytest.mark.parametrize("sharpness", [0.1, 2.0, 6.0])
def test_equals_the_sum_over_all_boxes(box, sharpness):
  rng = np.random.default_rng(0)
  scores = sharpness * rng.normal(size=(4, BINS))
  scores[range(4), box] += sharpness
  probs = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  # The order of the bins does not matter.
  order = np.argsort(-probs, axis=1)
  ranked = np.take_along_axis(probs, order, 1)
  found = probability_of_overlap(order, ranked, box)
  # 1e-7 for each pair of bins of both axes.
  assert found == pytest.approx(brute_force(probs, box), abs=8e-6)


def test_certain_coordinates():
  bins, probs = np.array([[1], [1], [4], [4]]), np.ones((4, 1))
  assert probability_of_overlap(bins, probs, (1, 1, 4, 4)) == 1
  # 6 of 12 cells is one half exactly; 4 of 14 is less.
  assert probability_of_overlap(bins, probs, (1, 1, 3, 4)) == 1
  assert probability_of_overlap(bins, probs, (0, 0, 3, 3)) == 0


@pytest.mark.parametrize("box", [(3, 1, 3, 4), (4, 1, 2, 4), (1, 4, 4, 1)])
def test_a_box_without_area_overlaps_nothing(box):
  bins = np.tile(np.arange(BINS), (4, 1))
  probs = np.full((4, BINS), 1 / BINS)
  assert probability_of_overlap(bins, probs, box) == 0
