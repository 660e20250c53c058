"""The sharding of parameters and batches."""

import pytest

from narvl_jax.errors import UserError
from narvl_jax.parallel import check_batch_size, make_mesh


@pytest.mark.parametrize(
  ("batch_size", "devices", "steps"), [(8, 8, 1), (16, 8, 2), (6, 2, 3)]
)
def test_batches_that_divide(batch_size, devices, steps):
  check_batch_size(batch_size, make_mesh(devices), accumulation_steps=steps)


@pytest.mark.parametrize(
  ("batch_size", "steps", "message"),
  [
    (12, 1, r"=12 is not divisible by 8 device\(s\); .*: 8 or 16: .*size=8$"),
    (15, 1, r"nearest valid: 8 or 16: --config.train.batch_size=16$"),
    (7, 1, r"train.batch_size=7 .*nearest valid: 8: .*batch_size=8$"),
    (0, 1, r"train.batch_size=0 .*nearest valid: 8: .*batch_size=8$"),
    (
      24,
      2,
      r"8 device\(s\) x 2 accumulation steps; .*: 16 or 32: .*size=16$",
    ),
    (8, 0, r"accumulation_steps=0 is below 1: .*accumulation_steps=1$"),
  ],
)
def test_batches_that_do_not_divide(batch_size, steps, message):
  with pytest.raises(UserError, match=message):
    check_batch_size(batch_size, make_mesh(), accumulation_steps=steps)


def test_batch_that_does_not_divide_over_its_devices():
  with pytest.raises(
    UserError, match=r"=6 is not divisible by data x fsdp = 4"
  ):
    check_batch_size(6, make_mesh(2, 2, 2))
