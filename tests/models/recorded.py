"""What the official code put out for two small models."""

import importlib.util
import json
import pathlib
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.interop import official_shapes
from narvl_jax.models import ModelConfig

# The recorded gradients of two tables are these rows.
GRADIENT_ROWS = {
  "encoder.embed_image_positions.weight": range(8),
  "encoder.image_rel_pos_table_list.0.weight": range(3443, 3450),
}

State = dict[str, np.ndarray]
Outputs = tuple[np.ndarray, dict[str, np.ndarray]]


class Recorded(NamedTuple):
  """The recorded arrays, their description and the official weights."""

  arrays: dict[str, np.ndarray]
  about: dict[str, Any]
  state: State


def inputs(recorded: Recorded) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Pictures NHWC, text and picture mask."""
  return (
    jnp.asarray(recorded.arrays["patch_images"].transpose(0, 2, 3, 1)),
    jnp.asarray(recorded.arrays["src_tokens"], jnp.int32),
    jnp.asarray(recorded.arrays["patch_masks"]),
  )


def import_file(path: pathlib.Path) -> ModuleType:
  """Imports a Python file that is not part of a package."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def read_recorded(
  shared: pathlib.Path, name: str, config: ModelConfig
) -> Recorded:
  """Reads what was recorded, and makes the weights."""
  folder = shared / "fixtures"
  about = json.loads((folder / f"{name}.json").read_text())
  recipe = import_file(folder / "recipe.py")
  state = recipe.fill(
    official_shapes(config), about["recipe_base"], about["pulls"]
  )
  with np.load(folder / f"{name}.npz") as arrays:
    return Recorded(dict(arrays), about, state)


def compare_weights(recorded: Recorded) -> None:
  """Compares the sums of the weights."""
  for name, value in recorded.state.items():
    shape, _, (total, squares, norm) = recorded.about["state_dict"][name]
    wide = value.astype(np.float64)
    assert list(value.shape) == shape, name
    np.testing.assert_allclose(
      [wide.sum(), np.abs(wide).sum(), np.linalg.norm(wide)],
      [total, squares, norm],
      rtol=1e-9,
      atol=1e-9,
      err_msg=name,
    )


def compare_outputs(recorded: Recorded, outputs: Outputs) -> None:
  """Compares logits and intermediates; of the encoder where it has tokens."""
  arrays, (logits, aux) = recorded.arrays, outputs
  valid = ~arrays["encoder_padding_mask"]
  np.testing.assert_array_equal(aux["encoder_mask"], valid)
  positions = np.broadcast_to(
    aux["position_embeddings"], arrays["position_embeddings"].shape
  )
  for name, actual, expected in (
    (
      "image_features",
      aux["image_features"].transpose(0, 3, 1, 2),
      arrays["image_features"],
    ),
    ("encoder_out", aux["encoder_out"][valid], arrays["encoder_out"][valid]),
    ("position_embeddings", positions, arrays["position_embeddings"]),
    ("decoder_out", aux["decoder_out"], arrays["decoder_features"]),
    ("logits", logits, arrays["logits"]),
  ):
    np.testing.assert_allclose(
      actual, expected, rtol=0, atol=1e-4, err_msg=name
    )


def compare_gradients(recorded: Recorded, case: str, gradient: State) -> int:
  """Compares all norms and some values; returns how many values."""
  arrays = recorded.arrays
  norms = dict(
    zip(arrays[f"{case}/grad_names"], arrays[f"{case}/grad_norms"], strict=True)
  )
  for name, norm in norms.items():
    if name not in gradient:
      assert np.isnan(norm), name  # The official code has no gradient either.
      continue
    # Biases of keys have a gradient of zero up to rounding.
    assert np.linalg.norm(gradient[name]) == pytest.approx(
      norm, rel=1e-4, abs=1e-6
    ), name
  rows = GRADIENT_ROWS | {
    "encoder.embed_tokens.weight": arrays[f"{case}/embed_rows"]
  }
  compared = 0
  for key, expected in arrays.items():
    if not key.startswith((f"{case}/grad/", f"{case}/grad_rows/")):
      continue
    name = key.rsplit("/", 1)[-1]
    actual = gradient[name]
    if "/grad_rows/" in key:
      actual = actual[np.asarray(rows[name])]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      actual, expected, rtol=0, atol=max(1e-4 * scale, 1e-7), err_msg=name
    )
    compared += 1
  return compared
