"""Converted files reproduce recorded outputs of the official code."""

import dataclasses
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
from tests.models import test_autoregressive_fixture as autoregressive
from tests.models import test_micro_fixture as micro
from tests.models.recorded import Recorded, inputs


def forward(config: Any, variables: Any, recorded: Recorded) -> Any:
  """Logits and intermediates of NARVL for the recorded inputs."""
  image, text, mask = inputs(recorded)
  apply = jax.jit(NARVL(config).apply)
  return jax.device_get(apply(variables, image, text, image_mask=mask))


def read(folder: pathlib.Path, name: str, config: Any, variables: Any) -> Any:
  """As in the tests of the model, but with the weights of the file."""
  with np.load(folder / f"{name}.npz") as arrays:
    return Recorded(
      dict(arrays),
      json.loads((folder / f"{name}.json").read_text()),
      official_from_variables(variables, config),
    )


@pytest.fixture(scope="module")
def folder(shared_files: pathlib.Path) -> pathlib.Path:
  return shared_files / "fixtures"


@pytest.fixture(scope="module")
def recorded(folder: pathlib.Path) -> Recorded:
  config, variables = load_official(folder / "micro_nar.lean.pt")
  assert config.num_queries == 5
  return read(folder, "micro_nar", config, variables)


def test_outputs_losses_and_tokens(
  folder: pathlib.Path, recorded: Recorded
) -> None:
  config, variables = load_official(folder / "micro_nar.lean.pt")
  outputs = forward(config, variables, recorded)
  micro.test_outputs(recorded, outputs)
  micro.test_greedy(recorded, outputs)
  micro.test_losses(recorded, outputs)
  for mode in ("plain", "collapse"):
    micro.test_collapse(recorded, outputs, mode)


def test_gradients(recorded: Recorded) -> None:
  micro.test_gradients(recorded)


def test_half_precision(folder: pathlib.Path, recorded: Recorded) -> None:
  """Equal up to the rounding of the weights."""
  config, variables = load_official(folder / "micro_nar.half.lean.pt")
  logits, _ = forward(config, variables, recorded)
  sure = recorded.arrays["greedy_margin"] > 0.1
  np.testing.assert_array_equal(
    logits.argmax(-1)[sure], recorded.arrays["greedy"][sure]
  )
  got = official_from_variables(variables, config)
  for key, value in recorded.state.items():
    np.testing.assert_array_equal(
      got[key], value.astype(np.float16).astype(np.float32), err_msg=key
    )


def test_ofa_as_a_narvl(folder: pathlib.Path) -> None:
  """The encoder of AR weights reproduces the official output."""
  made = convert_official(folder / "micro_ar.lean.pt", Options(num_queries=5))
  recorded = read(folder, "micro_ar", made.config, made.variables)
  _, parts = forward(made.config, made.variables, recorded)
  valid = ~recorded.arrays["encoder_padding_mask"]
  np.testing.assert_allclose(
    parts["encoder_out"][valid],
    recorded.arrays["encoder_out"][valid],
    atol=1e-4,
  )


def test_ofa_as_it_is(folder: pathlib.Path) -> None:
  """Outputs, losses, gradients and answers of the autoregressive model."""
  config, variables = load_official(
    folder / "micro_ar.lean.pt", options=Options(decoder="autoregressive")
  )
  # Settings that neither the shapes nor the file determine.
  assert config == dataclasses.replace(
    autoregressive.CONFIG, dropout=config.dropout
  )
  recorded = read(folder, "micro_ar", config, variables)
  autoregressive.test_weights(recorded)
  tokens, _ = autoregressive.forcing(recorded)
  outputs = jax.device_get(
    autoregressive.apply(variables, *inputs(recorded), tokens)
  )
  autoregressive.test_outputs(recorded, outputs)
  autoregressive.test_losses(recorded, outputs)
  autoregressive.test_gradients(recorded)
  encoded = autoregressive.encode(recorded, variables)
  for case in ("greedy", "beam5_refcoco", "beam3_prefix_trie"):
    autoregressive.test_generation(recorded, variables, encoded, case)
