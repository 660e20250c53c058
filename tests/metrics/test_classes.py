"""Confusion matrices and POPE."""

import math

import numpy as np
import pytest

from narvl_jax.metrics import classes


def test_confusion():
  found = classes.confusion(
    ["yes", "no", "yes", "perhaps", "no"],
    ["yes", "yes", "no", "no", "no"],
    ("yes", "no", "maybe"),
  )
  np.testing.assert_array_equal(
    found.counts, [[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
  )
  assert found.accuracy == pytest.approx(0.4)
  report = found.per_class()
  assert report["yes"] == {
    **{"precision": 0.5, "recall": 0.5, "f1": 0.5, "examples": 2}
  }
  assert report["no"]["recall"] == pytest.approx(1 / 3)
  assert math.isnan(report["maybe"]["recall"])
  assert report["maybe"]["examples"] == 0


def test_unknown_targets():
  with pytest.raises(ValueError, match='"x" is none of yes, no'):
    classes.confusion(["yes"], ["x"], ("yes", "no"))
  with pytest.raises(ValueError, match="shorter"):
    classes.confusion(["yes"], [], ("yes", "no"))


def test_pope():
  said = ["yes", "Yes, there is.", "no", "There is no dog", "not. Yes", "dog"]
  true = ["yes", "no", "no", "yes", "no", "yes"]
  # As the official program reads them: yes, yes, no, no, no, yes.
  assert classes.pope(said, true) == pytest.approx(
    {
      "accuracy": 4 / 6,
      "precision": 2 / 3,
      "recall": 2 / 3,
      "f1": 2 / 3,
      "yes_ratio": 0.5,
    }
  )


def test_pope_without_questions():
  assert all(math.isnan(x) for x in classes.pope([], []).values())
