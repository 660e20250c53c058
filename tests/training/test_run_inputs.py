"""The seed and the learning rate are inputs of the compiled update."""

import jax
import numpy as np
import pytest

from narvl_jax.training.run_inputs import RunInputs
from tests.support import stand_in

SETTINGS = {"dropout": 0.5, "optimizer__schedule": "linear"}


@pytest.mark.parametrize("key", ["seed", "optimizer__learning_rate"])
def test_another_value_is_the_same_program(key: str):
  one, other = (stand_in.setup(**SETTINGS, **{key: value}) for value in (1, 2))
  texts = [run.trace_step().lower().as_text() for run in (one, other)]
  assert texts[0] == texts[1]
  for a, b in zip(one.read_inputs(), other.read_inputs(), strict=True):
    assert (a is None) or (a.shape, a.dtype) == (b.shape, b.dtype)
  different = [
    not np.array_equal(getattr(one.read_inputs(), name), value)
    for name, value in other.read_inputs()._asdict().items()
  ]
  assert sum(different) == 1


def test_inputs_change_the_update():
  run = stand_in.setup(**SETTINGS)
  inputs = run.read_inputs()
  assert inputs.teacher is None
  other_seed = stand_in.setup(**SETTINGS, seed=1).read_inputs()
  faster = inputs._replace(learning_rate=2 * inputs.learning_rate)

  def update(inputs: RunInputs) -> tuple[float, float]:
    _, metrics = run.program(
      inputs, stand_in.initial_state(run), stand_in.batch(run, 0)
    )
    return float(metrics["loss"]), float(metrics["learning_rate"])

  loss, rate = update(inputs)
  assert update(inputs) == (loss, rate)
  assert update(faster) == (loss, 2 * rate)
  assert update(other_seed)[0] != loss
  assert update(other_seed)[1] == rate


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_numbers_are_those_of_a_program_with_constants(schedule: str):
  run = stand_in.setup(
    dropout=0.5, optimizer__schedule=schedule, optimizer__warmup_steps=2, seed=3
  )
  # As before the seed became an input: `jax.random.key(3)` in the program.
  inputs = RunInputs(
    np.asarray(jax.random.key_data(jax.random.key(3))), np.float32(0.01)
  )
  constant = jax.jit(lambda state, batch: run.program(inputs, state, batch))
  a, b = (stand_in.initial_state(run) for _ in "ab")
  for index in range(4):
    a, metrics = run.train_step(a, stand_in.batch(run, index))
    b, expected = constant(b, stand_in.batch(run, index))
    # Dropout masks are equal bit for bit; sums may be rounded differently.
    for name, value in expected.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7),
    *jax.device_get((a, b)),
  )
