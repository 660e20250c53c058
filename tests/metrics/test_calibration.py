"""Temperature, calibration error and abstaining."""

import numpy as np
import pytest

from narvl_jax.metrics import calibration


def _data(temperature, count=20_000):
  """Answers whose true probability is a tempered one of what is stated."""
  rng = np.random.default_rng(0)
  stated = 1 / (1 + np.exp(-rng.normal(0.5, 3, size=count)))
  true = calibration.apply_temperature(stated, temperature)
  return stated, (rng.random(count) < true).astype(float)


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 4])
def test_the_temperature_is_found(temperature):
  stated, correct = _data(temperature)
  found = calibration.fit_temperature(stated, correct)
  assert found == pytest.approx(temperature, rel=0.08)
  before = calibration.reliability(stated, correct).error
  after = calibration.reliability(
    calibration.apply_temperature(stated, found), correct
  ).error
  assert after < 0.02
  if temperature != 1:
    assert after < before / 2


def test_extreme_answers():
  assert calibration.fit_temperature([], []) == 1
  assert calibration.fit_temperature([0.9, 0.8], [1, 1]) == pytest.approx(0.05)
  assert calibration.fit_temperature([0.9, 0.1], [0, 1]) == pytest.approx(20)
  assert np.isfinite(calibration.fit_temperature([1.0, 0.0, 1.0], [1, 0, 0]))
  found = calibration.apply_temperature([0.0, 1.0], 0.05)
  assert np.all((found >= 0) & (found <= 1))


def test_reliability():
  found = calibration.reliability([0.05, 0.15, 0.95, 1.0], [0, 1, 1, 0], 10)
  np.testing.assert_array_equal(found.count[[0, 1, 9]], [1, 1, 2])
  assert found.confidence[9] == pytest.approx(0.975)
  assert found.accuracy[9] == pytest.approx(0.5)
  assert np.isnan(found.accuracy[5])
  assert found.error == pytest.approx((0.05 + 0.85 + 2 * 0.475) / 4)
  assert calibration.reliability([], []).error == 0


def test_abstention():
  p = [0.9, 0.8, 0.7, 0.6, 0.6]
  found = calibration.abstention(p, [1, 1, 0, 1, 0], 0.75)
  # The two answers of probability 0.6 go together and would give 3 of 5.
  assert found == calibration.Abstention(0.8, 0.4, 1.0)
  assert calibration.abstention(p, [0] * 5, 0.5) is None
  everything = calibration.abstention(p, [1] * 5, 1.0)
  assert everything is not None
  assert everything.coverage == 1
  assert calibration.abstention([], [], 0.5) is None
