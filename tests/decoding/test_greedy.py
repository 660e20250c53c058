"""Greedy decoding against enumeration of every path."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax import decoding
from narvl_jax.models import NARVL, model_config
from narvl_jax.query_ctc import query_ctc_loss

PAD, BLANK, CLASSES, QUERIES = 1, 4, 5, 4
# Ignored by a parallel decoder.
LENGTHS = np.zeros(2, np.int32)


def _collapse(path: tuple[int, ...], merge: bool) -> tuple[int, ...]:
  """The definition, one token at a time."""
  if merge:
    path = tuple(token for token, _ in itertools.groupby(path))
  return tuple(token for token in path if token not in (BLANK, PAD))


def _decode(logits, merge, forbidden=None) -> dict[str, np.ndarray]:
  decoded = decoding.greedy_decode(
    jnp.asarray(logits),
    jnp.asarray(merge),
    blank_id=BLANK,
    pad_id=PAD,
    forbidden=forbidden,
  )
  return jax.tree.map(np.asarray, decoded)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.normal(0, 2, (16, QUERIES, CLASSES)).astype(np.float32)


@pytest.mark.parametrize("merge", [True, False])
def test_answer_has_the_sum_over_all_its_alignments(logits, merge):
  logits = logits.copy()
  logits[..., PAD] = -30  # An answer has no pad.
  decoded = _decode(logits, [merge] * len(logits))
  probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  longer = 0
  for i, p in enumerate(probs):
    answer = tuple(decoded["ids"][i, : decoded["lengths"][i]])
    assert answer == _collapse(tuple(p.argmax(-1)), merge)
    assert set(decoded["ids"][i, decoded["lengths"][i] :]) <= {PAD}
    expected = sum(
      np.prod([p[n, c] for n, c in enumerate(path)])
      for path in itertools.product(range(CLASSES), repeat=QUERIES)
      if _collapse(path, merge) == answer
    )
    np.testing.assert_allclose(
      np.exp(decoded["log_prob"][i]), expected, rtol=1e-5
    )
    longer += expected > 1.01 * np.prod(p.max(-1))
  assert longer > 5  # Some answers have more than one alignment.


def test_merged_answer_has_the_likelihood_of_the_loss(logits):
  decoded = _decode(logits, [True] * len(logits))
  answers = map(jnp.asarray, (logits, decoded["ids"], decoded["lengths"]))
  nll = query_ctc_loss(*answers, blank_id=BLANK)
  np.testing.assert_allclose(decoded["log_prob"], -nll, rtol=1e-5, atol=1e-6)


def test_merging_is_chosen_row_by_row():
  path = np.array([2, 2, BLANK, 2])
  logits = np.tile(10 * np.eye(CLASSES, dtype=np.float32)[path], (2, 1, 1))
  decoded = _decode(logits, [True, False])
  np.testing.assert_array_equal(decoded["lengths"], [2, 3])
  np.testing.assert_array_equal(decoded["ids"], [[2, 2, 1, 1], [2, 2, 2, 1]])
  assert (np.exp(decoded["log_prob"]) > 0.99).all()


def test_all_blank_is_the_empty_answer():
  logits = np.zeros((1, QUERIES, CLASSES), np.float32)
  logits[..., BLANK] = 3
  decoded = _decode(logits, [True])
  assert decoded["lengths"] == [0]
  blank = np.exp(3) / (np.exp(3) + CLASSES - 1)
  np.testing.assert_allclose(np.exp(decoded["log_prob"]), [blank**4], rtol=1e-5)


def test_forbidden_classes_lose_their_mass(logits):
  forbidden = np.array([True, True, False, False, False])
  merge = np.arange(len(logits)) % 2 == 0
  masked = _decode(logits, merge, forbidden)
  assert not np.isin(masked["ids"], [0]).any()
  # The rest is a distribution of its own, as if the classes did not exist.
  gone = np.where(forbidden, -80.0, logits).astype(np.float32)
  expected = _decode(gone, merge)
  np.testing.assert_array_equal(masked["ids"], expected["ids"])
  np.testing.assert_allclose(
    masked["log_prob"], expected["log_prob"], rtol=1e-5
  )
  assert np.isin(_decode(logits, merge)["ids"], [0]).any()


class _Lookup(nn.Module):
  """Answers with the rows of a table; image and mask shift the logits."""

  scale: float = 1.0

  def setup(self):
    self.table = self.param("table", nn.initializers.normal(), (8, CLASSES))

  def encode(self, image, text, *, image_mask):
    shift = jnp.where(image_mask, jnp.mean(image, (1, 2, 3)), 0.0)
    return self.scale * self.table[text] + shift[:, None, None]

  def decode(self, encoded):
    return encoded


def _predict_step(model, forbidden=None):
  classes = decoding.Classes.of(
    CLASSES, pad_id=PAD, blank_id=BLANK, forbidden=forbidden
  )
  return decoding.make_steps(model, decoding.ParallelReader(classes)).predict


def test_predict_step_runs_the_model_without_training():
  model = _Lookup()
  table = 9 * np.eye(8, CLASSES, dtype=np.float32)
  step = _predict_step(model)
  decoded = step(
    {"params": {"table": table, "embed_tokens": np.eye(8, CLASSES)}},
    np.zeros((2, 4, 4, 3), np.float32),
    np.array([[2, 2, 4, 3], [4, 2, 2, 4]]),
    np.ones(2, bool),
    np.array([True, False]),
    LENGTHS,
  )
  np.testing.assert_array_equal(
    decoded["ids"][:, 0], [[2, 3, 1, 1], [2, 2, 1, 1]]
  )


def test_rows_that_only_pad_the_table_are_never_predicted():
  config = model_config(
    "tiny",
    vocab_size=CLASSES,
    num_queries=QUERIES,
    width=32,
    mlp_width=32,
    encoder_layers=1,
    decoder_layers=1,
    resnet_blocks=(1, 1, 1),
  )
  model = NARVL(config)
  step = _predict_step(model)
  inputs = (
    np.zeros((2, 32, 32, 3), np.float32),
    np.array([[0, 3, 2], [0, 2, 1]]),
    np.ones(2, bool),
    np.zeros(2, bool),
    LENGTHS,
  )
  shapes = nn.unbox(
    jax.eval_shape(
      lambda key: model.init(key, *inputs[:2], image_mask=inputs[2]),
      jax.random.key(0),
    )
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(rng.uniform(0.1, 0.3, x.shape), x.dtype), shapes
  )
  table = variables["params"]["embed_tokens"]
  assert len(table) > CLASSES
  expected = step(variables, *inputs)
  # With one of the two signs, such rows would win at every query.
  for huge in (1e3, -1e3):
    moved = table.at[CLASSES:].set(huge)
    variables["params"]["embed_tokens"] = moved
    decoded = step(variables, *inputs)
    assert np.all(decoded["ids"] < CLASSES)
    np.testing.assert_array_equal(decoded["ids"], expected["ids"])
    np.testing.assert_array_equal(decoded["log_probs"], expected["log_probs"])


def test_decoding_runs_inside_the_jitted_step():
  step = _predict_step(_Lookup())
  table = jax.ShapeDtypeStruct((8, CLASSES), jnp.float32)
  lowered = step.lower(
    {"params": {"table": table, "embed_tokens": table}},
    jax.ShapeDtypeStruct((2, 4, 4, 3), jnp.float32),
    jax.ShapeDtypeStruct((2, QUERIES), jnp.int32),
    jax.ShapeDtypeStruct((2,), bool),
    jax.ShapeDtypeStruct((2,), bool),
    jax.ShapeDtypeStruct((2,), jnp.int32),
  )
  # All that leaves the device is the answer; no [B, N, V].
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), lowered.out_info)
  assert shapes == {
    "ids": ((2, 1, QUERIES), jnp.int32),
    "lengths": ((2, 1), jnp.int32),
    "log_probs": ((2, 1), jnp.float32),
    "query_entropy": ((2, QUERIES), jnp.float32),
  }


def test_equal_models_share_one_predict_step():
  forbidden = np.zeros(CLASSES, bool)

  def make(scale, mask):
    return _predict_step(_Lookup(scale), mask)

  assert make(1.0, forbidden) is make(1.0, forbidden.copy())
  assert make(1.0, forbidden) is not make(2.0, forbidden)
  assert make(1.0, forbidden) is not make(1.0, None)
  assert make(1.0, forbidden) is not make(1.0, ~forbidden)
