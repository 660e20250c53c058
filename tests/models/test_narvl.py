"""What every NARVL promises: outputs, masks, padding, initial values."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.models import NARVL, ModelConfig, model_config, transformer
from narvl_jax.models.narvl import cross_attention
from narvl_jax.models.sizes import IMAGE_ENCODERS
from tests.models import small
from tests.models.small import CONFIG, IMAGE_TOKENS, B, N, T, V

S = IMAGE_TOKENS + T
CONFIGS = [
  dataclasses.replace(CONFIG, image_encoder=name, resnet_width=8)
  for name in IMAGE_ENCODERS
]


@pytest.fixture(scope="module")
def variables() -> small.Variables:
  return small.variables()


@pytest.fixture(scope="module")
def outputs(variables: small.Variables) -> Any:
  return jax.device_get(
    small.apply(CONFIG, variables, small.image(), small.text())
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=IMAGE_ENCODERS)
def test_shapes_and_types_of_the_outputs(
  config: ModelConfig, dtype: Any
) -> None:
  config = dataclasses.replace(config, dtype=dtype)
  rows, columns, channels = (
    (3, 4, 128) if config.image_encoder == "resnet" else (2, 3, 64)
  )
  image = small.image(B, 3 * 16, 4 * 16) if channels == 128 else small.image()
  logits, aux = jax.eval_shape(
    lambda v, x, text: NARVL(config).apply(v, x, text),
    small.shapes(config),
    image,
    small.text(),
  )
  length = rows * columns + T
  assert (logits.shape, logits.dtype) == ((B, N, V), jnp.float32)
  assert {k: (x.shape, x.dtype) for k, x in aux.items()} == {
    "image_features": ((B, rows, columns, channels), dtype),
    "encoder_out": ((B, length, 32), dtype),
    "encoder_mask": ((B, length), bool),
    "position_embeddings": ((length, 32), dtype),
    "decoder_out": ((B, N, 32), dtype),
  }


@pytest.mark.parametrize("config", CONFIGS, ids=IMAGE_ENCODERS)
def test_parameters_are_float32_in_any_compute_type(
  config: ModelConfig,
) -> None:
  config = dataclasses.replace(config, dtype=jnp.bfloat16)
  assert {x.dtype for x in jax.tree.leaves(small.shapes(config))} == {
    jnp.dtype(jnp.float32)
  }


def test_padding_rows_of_the_table_never_matter(
  variables: small.Variables, outputs: Any
) -> None:
  table = variables["params"]["embed_tokens"]
  assert table.shape[0] == CONFIG.padded_vocab_size == 256
  spoilt = table.copy()
  spoilt[V:] = np.nan
  changed = {"params": {**variables["params"], "embed_tokens": spoilt}}
  logits, _ = small.apply(CONFIG, changed, small.image(), small.text())
  np.testing.assert_array_equal(logits, outputs[0])
  _, gradient = small.gradient()
  of_table = gradient["params"]["embed_tokens"]
  assert not of_table[V:].any()
  assert of_table[:V].all()


def test_every_parameter_has_a_gradient() -> None:
  _, gradient = small.gradient()
  for path, value in small.flat(gradient).items():
    # A bias of the keys shifts all logits of a query alike.
    if path[-2:] in (("key", "bias"), ("position_bias", "bias")):
      continue
    assert np.abs(value).max() > 1e-7, path


@pytest.mark.parametrize("length", [T + 1, T + 9])
def test_padding_of_the_text_does_not_matter(
  variables: small.Variables, outputs: Any, length: int
) -> None:
  logits, aux = small.apply(
    CONFIG, variables, small.image(), small.text(length)
  )
  np.testing.assert_allclose(logits, outputs[0], rtol=0, atol=2e-5)
  mask = outputs[1]["encoder_mask"]
  assert mask.sum(1).tolist() == [IMAGE_TOKENS + n for n in (7, 5, 3)]
  np.testing.assert_array_equal(aux["encoder_mask"][:, :S], mask)
  assert not aux["encoder_mask"][:, S:].any()
  np.testing.assert_allclose(
    aux["encoder_out"][:, :S][mask],
    outputs[1]["encoder_out"][mask],
    rtol=0,
    atol=2e-5,
  )


def test_a_masked_picture_does_not_matter(
  variables: small.Variables, outputs: Any
) -> None:
  mask = jnp.array([True, False, True])
  black = small.image().at[1].set(0)
  with_image, without, unmasked = (
    small.apply(CONFIG, variables, x, small.text(), x_mask)
    for x, x_mask in (
      (small.image(), mask),
      (black, mask),
      (small.image(), jnp.ones_like(mask)),
    )
  )
  np.testing.assert_allclose(with_image[0], without[0], rtol=0, atol=1e-6)
  assert with_image[1]["encoder_mask"].sum(1).tolist() == [
    IMAGE_TOKENS + 7,
    5,
    IMAGE_TOKENS + 3,
  ]
  np.testing.assert_allclose(
    with_image[0][::2], unmasked[0][::2], rtol=0, atol=1e-6
  )
  # A program without a mask is another one, and rounds in other places.
  scale = np.abs(outputs[0]).max()
  np.testing.assert_allclose(unmasked[0], outputs[0], rtol=0, atol=1e-6 * scale)
  assert np.abs(with_image[0][1] - outputs[0][1]).max() > 0.01
  # Not masked, the same change of the picture is seen.
  seen, _ = small.apply(CONFIG, variables, black, small.text())
  assert np.abs(seen[1] - outputs[0][1]).max() > 0.01
  np.testing.assert_allclose(seen[::2], outputs[0][::2], rtol=0, atol=1e-6)


def test_a_sample_without_picture_and_text_stays_finite(
  variables: small.Variables,
) -> None:
  text = small.text().at[1].set(CONFIG.pad_id)
  mask = jnp.array([True, False, True])
  logits, _ = small.apply(CONFIG, variables, small.image(), text, mask)
  assert np.isfinite(logits).all()


def test_bytes_are_pixels_in_minus_one_to_one(
  variables: small.Variables,
) -> None:
  rng = np.random.default_rng(2)
  pixels = rng.integers(0, 256, small.image().shape, np.uint8)
  scaled = jnp.asarray(pixels / 127.5 - 1, jnp.float32)
  from_bytes, from_floats = (
    small.apply(CONFIG, variables, x, small.text())
    for x in (jnp.asarray(pixels), scaled)
  )
  np.testing.assert_allclose(from_bytes[0], from_floats[0], rtol=0, atol=1e-5)


def _equations(jaxpr: Any) -> Iterator[Any]:
  """All equations, those of inner programs included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
        yield from _equations(getattr(value, "jaxpr", value))


def test_biases_have_no_batch_axis() -> None:
  program = jax.make_jaxpr(lambda v, x, text: NARVL(CONFIG).apply(v, x, text))(
    small.shapes(), small.image(), small.text()
  )
  products, sums = [], []
  grids = {(S, S), (N, N), (N, S)}
  for equation in _equations(program.jaxpr):
    name = equation.primitive.name
    for shape in (x.aval.shape for x in equation.outvars):
      if len(shape) < 3 or shape[-2:] not in grids or B not in shape[:2]:
        continue
      inputs = [x.aval.shape for x in equation.invars]
      assert name not in ("gather", "scatter-add", "scatter"), shape
      if name == "broadcast_in_dim":  # The mask, and its constant.
        assert inputs[0] in ((), (B, 1, 1, shape[-1])), inputs
      if name == "dot_general":
        products.append(shape)
      if name == "add":
        sums.append(inputs)
  # One product of queries and keys in each kind of attention.
  heads = CONFIG.num_heads
  assert sorted(products) == sorted((B, heads, *grid) for grid in grids)
  assert sorted(sums) == sorted(
    [(1, B, heads, *grid), (1, 1, heads, *grid)] for grid in grids
  )


def test_initial_values_are_those_of_the_reference() -> None:
  config = model_config(
    "micro",
    width=64,
    mlp_width=96,
    encoder_layers=1,
    decoder_layers=1,
    vocab_size=500,
    num_queries=8,
  )
  init = jax.jit(NARVL(config).init)
  values, again, other = (
    nn.meta.unbox(
      init(jax.random.key(i, impl="rbg"), small.image(B, 32, 32), small.text())
    )
    for i in (0, 0, 1)
  )
  for a, b in zip(*map(jax.tree.leaves, (values, again)), strict=True):
    np.testing.assert_array_equal(a, b)
  different, others = 0, small.flat(other)
  for path, value in small.flat(values).items():
    name = path[-1]
    if name in ("scale", "var", "c_attn"):
      assert (value == 1).all(), path
    elif name.endswith("bias") or name == "mean":
      assert not value.any(), path
    else:
      different += 1
      assert (value != others[path]).any(), path
      expected = 0.02
      if "resnet" in path:  # Kaiming, fan-out
        height, width, _, out = value.shape[-4:]
        expected = (2 / (height * width * out)) ** 0.5
      spread = 4 / value.size**0.5
      assert np.std(value) == pytest.approx(expected, rel=spread), path
      assert abs(np.mean(value)) < expected * spread, path
  assert different > 30


def _collected(variables: small.Variables, mutable: Any = False) -> Any:
  return NARVL(CONFIG).apply(
    variables, small.image(), small.text(), mutable=mutable
  )


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11),
  reason="flax's scan rejects callbacks with this version of jax",
)
def test_cross_attention_is_the_softmax_of_queries_and_keys(
  variables: small.Variables, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Recomputed in NumPy from the arguments of the attention."""
  expected = []
  original = transformer.attend_to

  def softmax(q: Any, key: Any, bias: Any, mask: Any) -> None:
    logits = np.einsum("bqhd,bkhd->bhqk", q, key) + np.asarray(bias)
    logits = np.where(np.asarray(mask)[:, None, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    expected.append(weights / weights.sum(-1, keepdims=True))

  def spy(bias: Any, mask: Any, *record: Any) -> Any:
    attend = original(bias, mask, *record)

    def attended(q: Any, own: Any) -> Any:
      if record:
        jax.debug.callback(softmax, q, own.key, bias, mask, ordered=True)
      return attend(q, own)

    return attended

  monkeypatch.setattr(transformer, "attend_to", spy)
  _, collected = _collected(variables, ["intermediates"])
  jax.effects_barrier()
  found = cross_attention(collected["intermediates"])
  assert found.shape == (CONFIG.decoder_layers, B, CONFIG.num_heads, N, S)
  np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)


def test_attention_that_is_not_asked_for_is_not_in_the_program(
  variables: small.Variables, monkeypatch: pytest.MonkeyPatch
) -> None:
  logits, _ = _collected(variables)
  (recorded, _), _ = _collected(variables, ["intermediates"])
  np.testing.assert_array_equal(logits, recorded)

  def program() -> str:
    return jax.jit(lambda v: _collected(v)).lower(variables).as_text()

  before = program()
  original = transformer.attend_to
  monkeypatch.setattr(
    transformer, "attend_to", lambda bias, mask, *_: original(bias, mask)
  )
  assert program() == before
  assert set(small.shapes(CONFIG)) == {"params"}
