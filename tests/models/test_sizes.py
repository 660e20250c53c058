"""Sizes: parameters of the reference, fields, mistakes."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import official_shapes
from narvl_jax.models import NARVL, SIZES, ModelConfig, model_config

TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
N = 5
# Parameters of the official model without the query table.
REFERENCE = {
  "tiny": 33_488_592,
  "medium": 92_892_512,
  "base": 182_239_304,
  "large": 472_978_176,
  "huge": 929_488_128,
}


def variables(config: ModelConfig) -> Any:
  """Shapes of the variables; nothing is computed."""
  return jax.eval_shape(
    lambda: NARVL(config).init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 4), jnp.int32)
    )
  )


def count(tree: Any) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def unused(config: ModelConfig) -> int:
  """Official decoder parameters that the parallel decoder never reads."""
  image_positions = 42 * 42 + 1
  image_buckets = 83 * 83 + 3
  norms = 2 * 2 * config.width
  return (
    image_positions * config.width
    + norms
    + config.decoder_layers * image_buckets * config.num_heads
  )


@pytest.mark.parametrize("size", REFERENCE)
def test_parameters_of_the_reference(size: str) -> None:
  config = model_config(size, num_queries=N)
  expected = REFERENCE[size] + N * config.width - unused(config)
  official = {
    key: math.prod(shape)
    for key, shape in official_shapes(config).items()
    if key not in TIED and "running" not in key
  }
  assert sum(official.values()) == expected
  assert config.vocab_size == 59458
  padding = 59520 - 59458
  assert count(variables(config)["params"]) == expected + padding * config.width


@pytest.mark.parametrize(
  ("size", "expected"), [("tiny", 8_543_296), ("base", 27_535_424)]
)
def test_parameters_of_the_trunk(size: str, expected: int) -> None:
  tree = variables(model_config(size))["params"]["encoder"]["resnet"]
  assert count(tree) == expected


def test_official_tensors_of_base() -> None:
  """968 entries, of which we leave out buffers and unused tables."""
  keys = official_shapes(model_config("base"))
  trunk = [key for key in keys if "embed_images" in key]
  norms = 1 + 3 * (3 + 4 + 23) + 3
  counters = norms  # num_batches_tracked
  assert len(trunk) == 564 - counters
  buffers = 3 + 4
  tables = 1 + 2 * 2 + 6
  assert len(keys) == 968 - counters - buffers - tables


def test_as_a_user_types_it() -> None:
  config = model_config("base", num_queries=5, vocab_size=59458)
  logits, _ = jax.eval_shape(
    lambda v, image, text, mask: NARVL(config).apply(
      v, image, text, image_mask=mask
    ),
    variables(config),
    jnp.zeros((2, 32, 48, 3)),
    jnp.zeros((2, 4), jnp.int32),
    jnp.ones(2, bool),
  )
  assert logits.shape == (2, 5, 59458)


def test_every_field_can_be_overridden() -> None:
  fields: dict[str, Any] = {
    "width": 24,
    "mlp_width": 40,
    "num_heads": 3,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "resnet_blocks": [2, 1, 1],
    "resnet_width": 8,
    "num_queries": 7,
    "vocab_size": 100,
    "vocab_multiple": 16,
    "max_text_positions": 20,
    "token_bucket_size": 8,
    "image_bucket_size": 4,
  }
  config = model_config("micro", **fields)
  for name, value in fields.items():
    assert getattr(config, name) == (
      tuple(value) if name == "resnet_blocks" else value
    )
  shapes = official_shapes(config)
  assert shapes["encoder.embed_tokens.weight"] == (100, 24)
  assert config.padded_vocab_size == 112
  assert shapes["decoder.query_embed.weight"] == (7, 24)
  assert shapes["encoder.layers.0.fc1.weight"] == (40, 24)
  assert shapes["encoder.layers.0.self_attn.c_attn"] == (3,)
  assert shapes["encoder.embed_positions.weight"] == (20, 24)
  assert shapes["encoder.embed_image_positions.weight"] == (17, 24)
  assert shapes["encoder.token_rel_pos_table_list.0.weight"] == (15, 3)
  assert shapes["encoder.image_rel_pos_table_list.0.weight"] == (52, 3)
  assert shapes["encoder.embed_images.conv1.weight"] == (8, 3, 7, 7)
  assert "encoder.layers.1.fc1.weight" not in shapes
  assert "decoder.layers.2.fc1.weight" in shapes
  assert "encoder.embed_images.layer1.1.conv1.weight" in shapes
  assert "encoder.embed_images.layer2.1.conv1.weight" not in shapes


def test_configurations_are_values() -> None:
  a, b = model_config("tiny"), model_config("tiny")
  assert a == b
  assert hash(a) == hash(b)
  assert model_config("tiny", num_queries=6) != a
  with pytest.raises(dataclasses.FrozenInstanceError):
    a.width = 3  # pyright: ignore


@pytest.mark.parametrize(
  ("vocab", "multiple", "rows"),
  [(59458, 128, 59520), (128, 128, 128), (129, 128, 256), (253, 1, 253)],
)
def test_rows_of_the_table(vocab: int, multiple: int, rows: int) -> None:
  config = model_config("micro", vocab_size=vocab, vocab_multiple=multiple)
  assert config.padded_vocab_size == rows


@pytest.mark.parametrize(
  ("size", "fields", "message"),
  [
    ("bas", {}, 'model.size="bas" is unknown. Did you mean "base"'),
    ("giant", {}, "Valid: base, huge, large, medium, micro, tiny"),
    ("tiny", {"num_query": 3}, 'model.num_query is .*mean "num_queries"'),
    ("tiny", {"widht": 3}, r'mean "width".*\(--config.model.widht\)'),
    (
      "tiny",
      {"width": 250},
      "width=250 .* model.num_heads=4; nearest width: 248",
    ),
    ("tiny", {"width": 1, "num_heads": 2}, "nearest width: 2"),
    ("tiny", {"attention": "palas"}, 'Did you mean "pallas"'),
    ("tiny", {"attention": "cudnn"}, 'heads of 64 in float32, .*"blocks"'),
    ("tiny", {"remat": "ful"}, 'remat="ful" is unknown. Did you mean "full"'),
    ("tiny", {"batch_norm": "sync"}, "Valid: batch, frozen"),
    ("tiny", {"image_encoder": "con"}, 'mean "conv"'),
    ("tiny", {"num_queries": 0}, "num_queries=0 must be at least 1"),
    ("tiny", {"num_heads": 0}, "num_heads=0 must be at least 1"),
    ("tiny", {"mlp_width": 0}, "mlp_width=0 must be at least 1"),
    ("tiny", {"vocab_multiple": 0}, "vocab_multiple=0 must be at least 1"),
    ("tiny", {"decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
    ("tiny", {"patch_size": 0}, "patch_size=0 must be at least 1"),
    (
      "tiny",
      {"image_encoder": "conv", "patch_size": 7},
      "patch_size=7 must be even, such as 8",
    ),
    ("tiny", {"resnet_blocks": (3, 4)}, r"resnet_blocks=\(3, 4\) .* three"),
    ("tiny", {"resnet_blocks": (3, 0, 6)}, r"resnet_blocks=\(3, 0, 6\) .*"),
    ("tiny", {"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ("tiny", {"encoder_drop_path": -0.1}, "encoder_drop_path=-0.1 must"),
    (
      "micro",
      {"num_queries": 131},
      "num_queries=131 exceeds model.max_text_positions=130",
    ),
  ],
)
def test_mistakes(size: str, fields: dict[str, Any], message: str) -> None:
  with pytest.raises(UserError, match=message) as error:
    model_config(size, **fields)
  assert re.search(r"\(--config\.model\.\w+\)$", str(error.value))


def test_sizes_by_name() -> None:
  assert ("micro", *REFERENCE) == SIZES
