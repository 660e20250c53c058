"""Weights of the official code: both directions, and mistakes."""

import argparse
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import (
  official_from_variables,
  official_shapes,
  variables_from_official,
)
from narvl_jax.models import model_config
from tests.models import small

CONFIG = model_config(
  "micro",
  width=12,
  mlp_width=20,
  num_heads=3,
  encoder_layers=3,
  decoder_layers=2,
  resnet_blocks=(1, 3, 2),
  resnet_width=4,
  num_queries=4,
  vocab_size=50,
  vocab_multiple=32,
  max_text_positions=9,
  token_bucket_size=4,
  image_bucket_size=3,
)
TABLE = "encoder.embed_tokens.weight"
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")

State = dict[str, np.ndarray]


@pytest.fixture
def state() -> State:
  """Different values in every tensor; the tied ones are equal."""
  rng = np.random.default_rng(0)
  made = {
    key: rng.standard_normal(shape, np.float32)
    for key, shape in official_shapes(CONFIG).items()
  }
  return made | {key: made[TABLE] for key in TIED}


def assert_same(a: State, b: State) -> None:
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key, strict=True)


def test_there_and_back(state: State) -> None:
  variables = variables_from_official(state, CONFIG)
  assert_same(official_from_variables(variables, CONFIG), state)


def test_back_and_there() -> None:
  variables = small.variables(CONFIG)
  variables["params"]["embed_tokens"][CONFIG.vocab_size :] = 0
  state = official_from_variables(variables, CONFIG)
  again = variables_from_official(state, CONFIG)
  a, b = small.flat(variables), small.flat(again)
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], strict=True)


def test_the_tree_is_that_of_the_model(state: State) -> None:
  variables = variables_from_official(state, CONFIG)
  expected = small.shapes(CONFIG)
  assert jax.tree.structure(variables) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (variables, expected)), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
  table = variables["params"]["embed_tokens"]
  np.testing.assert_array_equal(table[:50], state[TABLE])
  assert table.shape == (64, 12)
  assert not table[50:].any()


def test_layouts(state: State) -> None:
  """A few places by hand; the recorded outputs check all the others."""
  variables = variables_from_official(state, CONFIG)
  encoder = variables["params"]["encoder"]
  kernel = encoder["layers"]["self_attn"]["qkv"]["kernel"]
  for i, name in enumerate("qkv"):
    weight = state[f"encoder.layers.2.self_attn.{name}_proj.weight"]
    # Head 1 has the rows 4 to 7 of the official matrix.
    np.testing.assert_array_equal(kernel[2, :, i, 1], weight[4:8].T)
  conv = state["encoder.embed_images.layer2.2.conv2.weight"]
  np.testing.assert_array_equal(
    encoder["resnet"]["layer2_rest"]["conv2"]["kernel"][1],
    conv.transpose(2, 3, 1, 0),
  )
  np.testing.assert_array_equal(
    encoder["layers"]["ffn"]["fc1_kernel"][1],
    state["encoder.layers.1.fc1.weight"].T,
  )


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_become_float32(state: State, dtype: Any) -> None:
  rounded = {key: value.astype(dtype) for key, value in state.items()}
  variables = variables_from_official(rounded, CONFIG)
  expected = {key: x.astype(np.float32) for key, x in rounded.items()}
  assert_same(official_from_variables(variables, CONFIG), expected)


def test_gradients_convert_without_statistics(state: State) -> None:
  variables = variables_from_official(state, CONFIG)
  converted = jax.jit(
    lambda params: official_from_variables({"params": params}, CONFIG)
  )(variables["params"])
  assert_same(
    jax.device_get(converted),
    {key: x for key, x in state.items() if "running" not in key},
  )


def test_unused_official_tensors_are_left_out(state: State) -> None:
  unused = {
    "encoder.version": np.array([3.0]),
    "decoder.version": np.array([3.0]),
    "encoder.token_rp_bucket": np.zeros((4, 4), np.int64),
    "encoder.image_rp_bucket": np.zeros((4, 4), np.int64),
    "decoder.token_rp_bucket": np.zeros((4, 4), np.int64),
    "decoder.image_rp_bucket": np.zeros((4, 4), np.int64),
    "decoder.image_position_idx": np.zeros(4, np.int64),
    "encoder.embed_images.bn1.num_batches_tracked": np.array(7),
    "decoder.embed_image_positions.weight": np.zeros((10, 12)),
    "decoder.image_pos_ln.weight": np.zeros(12),
    "decoder.image_pos_ln.bias": np.zeros(12),
    "decoder.code_layernorm_embedding.weight": np.zeros(12),
    "decoder.code_layernorm_embedding.bias": np.zeros(12),
    "decoder.image_rel_pos_table_list.1.weight": np.zeros((28, 3)),
  }
  variables = variables_from_official(state | unused, CONFIG)
  assert_same(official_from_variables(variables, CONFIG), state)


def test_tied_tables_may_be_absent(state: State) -> None:
  less = {key: x for key, x in state.items() if key not in TIED}
  variables = variables_from_official(less, CONFIG)
  assert_same(official_from_variables(variables, CONFIG), state)


def refuse(state: State, message: str, config: Any = CONFIG) -> str:
  with pytest.raises(UserError, match=message) as error:
    variables_from_official(state, config)
  assert "\n" not in str(error.value)
  return str(error.value)


def test_missing_tensors_are_named(state: State) -> None:
  total = len(state)
  key = "decoder.layers.1.encoder_attn.k_proj.bias"
  del state[key]
  message = refuse(state, f"lack 1 of {total} tensors: {key}$")
  assert "nearest" not in message
  for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
    del state[f"encoder.layers.0.{name}"]
  refuse(
    state, rf"lack 5 of .*: {key}, .*0.fc1.bias, .*0.fc1.weight, .* and 1 more$"
  )


def test_left_over_tensors_are_named(state: State) -> None:
  state["encoder.adapter.weight"] = np.zeros(3)
  refuse(state, r"hold 1 unknown tensors: encoder.adapter.weight$")


def test_tensors_of_another_shape_are_named(state: State) -> None:
  key = "decoder.pos_ln.bias"
  state[key] = np.zeros(13)
  refuse(state, rf"{key} has shape \[13\], the configuration makes \[12\]$")


def test_tied_tables_that_differ(state: State) -> None:
  state[TIED[1]] = state[TIED[1]] + 1
  refuse(state, f"{TIED[1]} differs from {TABLE}; the model ties them")


@pytest.mark.parametrize(
  "fields",
  [
    {"num_queries": 3},
    {"width": 18, "num_heads": 2},
    {"mlp_width": 24},
    {"encoder_layers": 2, "decoder_layers": 3},
    {"resnet_blocks": (2, 3, 2)},
    {"resnet_width": 8},
    {"vocab_size": 49},
    {"max_text_positions": 10},
    {"token_bucket_size": 5, "image_bucket_size": 2},
  ],
  ids=lambda fields: ",".join(fields),
)
def test_another_architecture_is_reported_with_its_flags(
  state: State, fields: dict[str, Any]
) -> None:
  """Every difference is named, with the values of the file."""
  other = model_config("micro", **(vars(CONFIG) | fields))
  message = refuse(state, "nearest configuration: ", other)
  flags = message.split("nearest configuration: ")[1].split()
  expected = {
    f"--config.model.{name}={getattr(CONFIG, name)}".replace(" ", "")
    for name in fields
  }
  assert set(flags) == expected


def test_only_the_official_image_encoder() -> None:
  message = r'need model.image_encoder="resnet", not "conv" \(--config'
  with pytest.raises(UserError, match=message):
    variables_from_official({}, small.CONFIG)
  with pytest.raises(UserError, match=message):
    official_from_variables({"params": {}}, small.CONFIG)


@pytest.mark.parametrize(
  ("name", "dtype"),
  [("micro_nar.lean.pt", "float32"), ("micro_nar.half.lean.pt", "float16")],
)
def test_official_files(
  shared_files: pathlib.Path, name: str, dtype: str
) -> None:
  """A whole official state dict loads, with unused tables and buffers."""
  torch = pytest.importorskip("torch")
  with torch.serialization.safe_globals([argparse.Namespace]):
    file = torch.load(shared_files / "fixtures" / name, weights_only=True)
  state = {key: x.numpy() for key, x in file["model"].items()}
  config = model_config(
    "micro",
    resnet_width=64,
    max_text_positions=1026,
    image_bucket_size=42,
    num_queries=5,
    vocab_size=253,
  )
  variables = variables_from_official(state, config)
  assert state[TABLE].dtype == dtype
  back = official_from_variables(variables, config)
  assert len(back) < len(state)
  assert_same(back, {key: state[key].astype(np.float32) for key in back})
