"""Temperatures of predictions whose right calibration is known."""

import numpy as np
import pytest

from narvl_jax.evaluation import calibrating
from narvl_jax.metrics.calibration import apply_temperature


def overconfident(task: str, key: str) -> list[dict]:
  """Predictions whose true temperature is 2.5."""
  rng = np.random.default_rng(0)
  raw = rng.uniform(0.3, 0.999, 4000)
  right = rng.uniform(size=4000) < apply_temperature(raw, 2.5)
  return [
    {"task": task, "probability": 0.01, key: p, "scores": {"a": float(c)}}
    for p, c in zip(raw.tolist(), right, strict=True)
  ]


@pytest.mark.parametrize(
  ("task", "key"),
  [("vqa", "probability"), ("grounding", "probability_iou50")],
)
def test_fit_recovers_the_temperature(task: str, key: str) -> None:
  predictions = overconfident(task, key)
  predictions.append({"task": task, "probability": 1.0, "scores": None})
  ((name, measured),) = calibrating.by_task(predictions).items()
  assert name == task
  found = calibrating.fit(*measured)
  assert found["examples"] == 4000
  assert found["temperature"] == pytest.approx(2.5, rel=0.1)
  assert found["ece_after"] < 0.5 * found["ece_before"]
  threshold = found["thresholds"]["0.9"]
  assert threshold["accuracy"] >= 0.9
  assert 0 < threshold["coverage"] < 1
  text = calibrating.format_tasks({task: found})
  assert f"{100 * threshold['coverage']:.1f} %" in text
  assert "ECE before" in text


def test_a_temperature_within_the_noise_stays_1() -> None:
  rng = np.random.default_rng(3)
  fitted, chance = 0, []
  for _ in range(40):
    raw = rng.uniform(0.5, 1, 1000)
    found = calibrating.fit(raw, (rng.random(1000) < raw).astype(float))
    fitted += found["temperature"] != 1
    chance.append(found["ece_before"] / found["ece_by_chance"])
    if found["temperature"] == 1:
      assert found["ece_after"] == pytest.approx(found["ece_before"])
  # The level of the test is 5 %.
  assert fitted <= 6
  assert np.mean(chance) == pytest.approx(1, abs=0.1)


def test_a_temperature_of_1_has_one_diagram() -> None:
  measured = {
    task: (np.array([0.9, 0.8]), np.array([1.0, 0.0])) for task in "ab"
  }
  whole, one = (
    calibrating.draw(measured, {"a": temperature, "b": 1.0})
    for temperature in (2.0, 1.0)
  )
  assert (one.width, one.height) == (whole.width // 2, whole.height)
  # The right half of the second row is empty.
  half = whole.crop((one.width, whole.height // 2, whole.width, whole.height))
  assert half.getcolors() == [(half.width * half.height, (255, 255, 255))]


def test_an_accuracy_that_is_not_reached_has_no_threshold() -> None:
  found = calibrating.fit(np.array([0.9, 0.8]), np.array([0.0, 0.0]))
  assert found["thresholds"] == {"0.9": None, "0.95": None, "0.99": None}
  assert calibrating.format_tasks({"vqa": found}).split()[-1] == "-"
