"""Official files in, and the outputs that the official code recorded."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.interop import (
  Options,
  convert_official,
  load_official,
  official_from_variables,
)
from narvl_jax.models import NARVL
from tests.models import test_micro_fixture as micro
from tests.models.small import FAST_COMPILE


def forward(config: Any, variables: Any, arrays: dict[str, np.ndarray]) -> Any:
  """Logits and intermediates for the recorded inputs."""
  apply = jax.jit(NARVL(config).apply, compiler_options=FAST_COMPILE)
  return jax.device_get(
    apply(
      variables,
      arrays["patch_images"].transpose(0, 2, 3, 1),
      arrays["src_tokens"].astype(np.int32),
      image_mask=arrays["patch_masks"],
    )
  )


def load(folder: pathlib.Path, name: str) -> dict[str, np.ndarray]:
  with np.load(folder / f"{name}.npz") as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def recorded(shared_files: pathlib.Path) -> micro.Recorded:
  """As in the tests of the model, but with the weights of the file."""
  folder = shared_files / "fixtures"
  config, variables = load_official(folder / "micro_nar.lean.pt")
  assert config.num_queries == 5
  return micro.Recorded(
    load(folder, "micro_nar"),
    json.loads((folder / "micro_nar.json").read_text()),
    official_from_variables(variables, config),
  )


def test_outputs_losses_and_tokens(
  shared_files: pathlib.Path, recorded: micro.Recorded
) -> None:
  config, variables = load_official(
    shared_files / "fixtures" / "micro_nar.lean.pt"
  )
  outputs = forward(config, variables, recorded.arrays)
  micro.test_outputs(recorded, outputs)
  micro.test_greedy(recorded, outputs)
  micro.test_losses(recorded, outputs)
  for mode in ("plain", "collapse"):
    micro.test_collapse(recorded, outputs, mode)


def test_gradients(recorded: micro.Recorded) -> None:
  micro.test_gradients(recorded)


def test_half_precision(
  shared_files: pathlib.Path, recorded: micro.Recorded
) -> None:
  """Equal but for the rounding of the weights."""
  path = shared_files / "fixtures" / "micro_nar.half.lean.pt"
  config, variables = load_official(path)
  logits, _ = forward(config, variables, recorded.arrays)
  sure = recorded.arrays["greedy_margin"] > 0.1
  np.testing.assert_array_equal(
    logits.argmax(-1)[sure], recorded.arrays["greedy"][sure]
  )
  got = official_from_variables(variables, config)
  for key, value in recorded.state.items():
    np.testing.assert_array_equal(
      got[key], value.astype(np.float16).astype(np.float32), err_msg=key
    )


def test_micro_fixture_of_ofa(shared_files: pathlib.Path) -> None:
  """The encoder of AR weights gives what the official one gave."""
  folder = shared_files / "fixtures"
  made = convert_official(folder / "micro_ar.lean.pt", Options(num_queries=5))
  recorded = load(folder, "micro_ar")
  _, parts = jax.jit(NARVL(made.config).apply, compiler_options=FAST_COMPILE)(
    made.variables,
    recorded["patch_images"].transpose(0, 2, 3, 1),
    recorded["src_tokens"].astype(np.int32),
    image_mask=recorded["patch_masks"],
  )
  valid = ~recorded["encoder_padding_mask"]
  np.testing.assert_allclose(
    parts["encoder_out"][valid], recorded["encoder_out"][valid], atol=1e-4
  )
