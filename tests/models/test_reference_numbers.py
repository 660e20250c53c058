"""Outputs of the official code at size tiny, fp32, for the hashed weights.

Weights and inputs are a hash of the tensor's official name and the index, so
the comparison needs no file. The expected values carry six significant digits.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.interop import official_shapes, variables_from_official
from narvl_jax.models import NARVL, Autoregressive, model_config, project
from narvl_jax.models.encoder import EncoderOutput
from narvl_jax.models.resnet import ResNet
from narvl_jax.query_ctc import query_ctc_objective

CONFIG = model_config("tiny", num_queries=5, vocab_size=59458)
COUNTERPART = model_config("tiny", decoder="autoregressive", vocab_size=59457)
TEXT = np.array(
  [[0, 100, 2000, 30000, 45, 7, 2], [0, 61, 50263, 9, 2, 1, 1]], np.int32
)
IDS = [0, 1, 2, 3, 1000, 59457]
Outputs = tuple[np.ndarray, dict[str, np.ndarray]]
TABLE = "encoder.embed_tokens.weight"
_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")


def noise(name: str, size: int) -> np.ndarray:
  """`size` values in [-1, 1), float64, that only depend on the name."""
  x = np.arange(size, dtype=np.uint32)
  x += np.uint32(zlib.crc32(name.encode()))
  x ^= x >> 16
  x *= np.uint32(0x7FEB352D)
  x ^= x >> 15
  x *= np.uint32(0x846CA68B)
  x ^= x >> 16
  return x / 2.0**31 - 1.0


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The float32 values of one official tensor; the first rule that fits."""
  v = noise(TABLE if name in _TIED else name, int(np.prod(shape)))
  v = v.reshape(shape)
  if name.endswith("running_var"):
    v = 1 + 0.5 * np.abs(v)
  elif name.endswith("running_mean"):
    v *= 0.1
  elif name.endswith("c_attn"):
    v = 1 + 0.2 * v
  elif v.ndim == 1 and name.endswith("weight"):
    v = 1 + 0.1 * v
  elif v.ndim == 1:
    v *= 0.1
  elif v.ndim == 4:
    v *= np.sqrt(6 / np.prod(shape[1:]))
  elif "rel_pos_table" in name or "embed" in name:
    v *= 0.5
  else:
    v *= np.sqrt(3 / shape[1])
  return v.astype(np.float32)


def fill(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Fills a whole state dict; the tied tables are one array."""
  state = {k: tensor(k, s) for k, s in shapes.items() if k not in _TIED}
  return state | {key: state[TABLE] for key in _TIED}


def close(actual: Any, *expected: float) -> None:
  """Compares up to float error and the rounding of the printed values."""
  np.testing.assert_allclose(np.ravel(actual), expected, rtol=5e-6, atol=1e-4)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
  """Two pictures of 64x96 pixels, NHWC."""
  x = noise("image", 2 * 3 * 64 * 96).astype(np.float32)
  return x.reshape(2, 3, 64, 96).transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
  return fill(official_shapes(CONFIG))


@pytest.fixture(scope="module")
def variables(state: dict[str, np.ndarray]) -> dict[str, Any]:
  return jax.device_put(variables_from_official(state, CONFIG))


@pytest.fixture(scope="module")
def outputs(image: np.ndarray, variables: dict[str, Any]) -> list[Outputs]:
  """Outputs with both pictures, and with the second one masked."""
  apply = jax.jit(
    lambda v, mask: NARVL(CONFIG).apply(v, image, TEXT, image_mask=mask)
  )
  masks = np.array([[True, True], [True, False]])
  return [jax.device_get(apply(variables, mask)) for mask in masks]


def test_fill() -> None:
  close(
    noise("image", 5),
    *(0.259275342, -0.541095107, 0.835554051, -0.194595634, -0.212100425),
  )
  close(
    noise(TABLE, 3),
    *(-0.819504042, 0.081519555, 0.960407909),
  )


def test_resnet(outputs: list[Outputs]) -> None:
  features = outputs[0][1]["image_features"]
  assert features.shape == (2, 4, 6, 1024)
  close(features[0, 0, 0, :4], 17.6404, 1.67251, 4.39589, 21.3343)
  close(features[1, 3, 5, 1020:], 18.1373, 8.9738, 1.23646, 6.0551)
  close(features.mean(dtype=np.float64), 12.9575)
  close(np.square(features).mean(dtype=np.float64), 366.983)


@pytest.mark.parametrize(
  ("sample", "position", "expected"),
  [
    (0, 0, (1.55761, -0.520257, -1.1679, 0.556383, -1.19833)),
    (0, 23, (0.796167, -0.766097, -0.739854, 0.71015, -0.678101)),
    (0, 30, (1.18459, -0.234071, -1.21017, 0.409458, 0.0922007)),
    (1, 28, (1.22879, -0.519601, -1.18344, 0.574231, 0.224482)),
  ],
)
def test_encoder(
  outputs: list[Outputs],
  sample: int,
  position: int,
  expected: tuple[float, ...],
) -> None:
  close(outputs[0][1]["encoder_out"][sample, position, :5], *expected)


def test_encoder_mask(outputs: list[Outputs]) -> None:
  valid = outputs[0][1]["encoder_mask"].sum(1)
  np.testing.assert_array_equal(valid, [24 + 7, 24 + 5])


def test_logits(outputs: list[Outputs]) -> None:
  logits = outputs[0][0]
  assert logits.shape == (2, 5, 59458)
  assert logits.dtype == np.float32
  close(
    logits[0, 0, IDS],
    *(1.90406, 3.37591, 3.59539, -2.4831, 0.494805, -4.63762),
  )
  close(
    logits[1, 4, IDS],
    *(3.00971, 1.44246, 4.08361, -2.23597, 0.238365, -1.08374),
  )
  close(logits[0, 2, 58457:58461], 0.309644, 5.64923, 1.41104, 3.14553)
  close(logits.mean(dtype=np.float64), 0.0218829)
  close(np.square(logits).mean(dtype=np.float64), 21.5470)


def test_arg_max(outputs: list[Outputs]) -> None:
  np.testing.assert_array_equal(
    outputs[0][0].argmax(-1),
    [[21961, 55571, 51558, 57586, 6014], [16390, 55571, 49702, 57586, 34908]],
  )
  top = np.sort(outputs[0][0], axis=-1)
  assert (top[..., -1] - top[..., -2]).min() == pytest.approx(0.162, abs=1e-3)


def test_hidden_picture(outputs: list[Outputs]) -> None:
  (full, _), (masked, _) = outputs
  close(
    masked[1, 4, IDS],
    *(5.49928, -2.0481, 2.29151, -8.95079, 3.15939, 4.70664),
  )
  np.testing.assert_allclose(masked[0], full[0], atol=1e-5)


@pytest.mark.parametrize(
  ("confidence", "smoothing", "expected"),
  [
    ((1.0, 1.0), 0.0, 26.9748),
    ((1.0, 1.0), 0.1, 26.3574),
    ((1.0, 0.6), 0.0, 20.3875),
    ((1.0, 0.6), 0.1, 20.0126),
  ],
)
def test_loss(
  outputs: list[Outputs],
  confidence: tuple[float, float],
  smoothing: float,
  expected: float,
) -> None:
  loss, _ = query_ctc_objective(
    jnp.asarray(outputs[0][0]),
    jnp.array([[58500, 58700, 59000, 59400, 2], [5, 5, 2, 1, 1]]),
    jnp.array([5, 3]),
    blank_id=59457,
    label_smoothing=smoothing,
    confidence=jnp.array(confidence),
    confidence_mode="temper",
  )
  close(loss, expected)


def test_batch_statistics(image: np.ndarray, variables: dict[str, Any]) -> None:
  trunk = {k: v["encoder"]["resnet"] for k, v in variables.items()}
  features, updates = jax.jit(
    lambda v: ResNet(CONFIG).apply(v, image, True, mutable=["batch_stats"])
  )(trunk)
  close(features[0, 0, 0, :4], 1.91295, 2.44938, 0, 0)
  close(np.square(features).mean(dtype=np.float64), 4.85957)
  running = updates["batch_stats"]["bn1"]
  close(running["mean"][:4], -0.0236713, -0.0614112, -0.0629448, -0.0573241)
  close(running["var"][:4], 1.09925, 0.956433, 1.2383, 1.00784)


def test_autoregressive_logits(
  outputs: list[Outputs], state: dict[str, np.ndarray]
) -> None:
  # A shorter table has the same first rows, so the encoder sees no difference.
  shapes = official_shapes(COUNTERPART)
  assert set(state) - set(shapes) == {"decoder.query_embed.weight"}
  shorter = {key: state[key][: shape[0]] for key, shape in shapes.items()}
  aux = outputs[0][1]
  encoded = EncoderOutput(
    *(
      jnp.asarray(aux[name])
      for name in (
        "encoder_out",
        "encoder_mask",
        "position_embeddings",
        "image_features",
      )
    )
  )
  tokens = np.array([[0, 58500, 58700, 59000, 59400], [0, 5, 5, 1, 1]])
  decode = jax.jit(
    lambda v: Autoregressive(COUNTERPART).apply(
      v, encoded, tokens, method=Autoregressive.decode
    )
  )
  variables = variables_from_official(shorter, COUNTERPART)
  table = variables["params"]["embed_tokens"][: COUNTERPART.vocab_size]
  logits = project(decode(variables), table)
  ids = [*IDS[:-1], 59456]
  close(
    logits[0, 0, ids],
    *(31.6672, -1.63629, 4.3195, 1.13429, -4.91038, 4.50956),
  )
  close(
    logits[0, 4, ids],
    *(10.2585, -3.54793, 6.58957, -5.08131, -6.06055, -3.0836),
  )
  close(
    logits[1, 2, ids],
    *(11.5042, 2.5861, 3.47205, -2.35061, -2.80534, 4.61802),
  )
