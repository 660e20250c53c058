"""An autoregressive and a parallel stand-in, and a batch for both.

They compile quickly and have the interfaces of the real models.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.data.example import TASKS
from narvl_jax.models import project
from tests.query_ctc.reference import log_softmax

B, T, L, N, V, D = 8, 5, 3, 4, 12, 6
BOS, PAD, EOS = 0, 1, 2
BLANK = V
CAPTION, VQA = TASKS.index("caption"), TASKS.index("vqa")
PROMPTED = tuple(name == "vqa" for name in TASKS)
KEY = jax.random.key(0)


class Decoder(nn.Module):
  """Each state depends on all previous tokens and their positions."""

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    tokens: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict]:
    del image_mask, train
    table = self.param("embed_tokens", nn.initializers.normal(0.5), (16, D))
    seen = (tokens != PAD)[..., None] * table[tokens]
    places = 1.0 + jnp.arange(tokens.shape[1])
    states = jnp.cumsum(seen * places[:, None], axis=1) / places[:, None]
    states += image.mean((1, 2))[:, :1, None] + table[text].mean(1)[:, None]
    return project(states, table[:V]), {"decoder_out": jnp.tanh(states)}


class Queries(nn.Module):
  """N queries; blank is an additional class."""

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    text: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, dict]:
    del image, image_mask, train
    table = self.param("embed_tokens", nn.initializers.normal(0.5), (16, D))
    queries = self.param("queries", nn.initializers.normal(0.5), (N, D))
    states = table[text].mean(1)[:, None] + queries
    return project(states, table[: V + 1]), {"decoder_out": states}


@functools.cache
def batch() -> dict[str, jax.Array]:
  """Rows of two tasks with different lengths of source and target."""
  rng = np.random.default_rng(0)
  text = rng.integers(3, V, (B, T)).astype(np.int32)
  lengths = rng.integers(3, T + 1, B)
  text[:, 0] = BOS
  for row, length in zip(text, lengths, strict=True):
    row[length - 1], row[length:] = EOS, PAD
  label_length = np.array([3, 1, 2, 3, 1, 3, 2, 1], np.int32)
  labels = rng.integers(3, V, (B, L)).astype(np.int32)
  for row, length in zip(labels, label_length, strict=True):
    row[length - 1], row[length:] = EOS, PAD
  rows = {
    "image": rng.normal(size=(B, 2, 2, 3)).astype(np.float32),
    "image_mask": np.ones(B, bool),
    "text": text,
    "labels": labels,
    "label_length": label_length,
    "confidence": rng.uniform(0.2, 1.0, B).astype(np.float32),
    "task": np.where(np.arange(B) % 2, VQA, CAPTION).astype(np.int32),
    "valid": np.arange(B) != 6,
  }
  return {name: jnp.asarray(x) for name, x in rows.items()}


@functools.cache
def decoder_variables() -> Any:
  rows = batch()
  init = jax.jit(Decoder().init)
  return init(KEY, rows["image"], rows["text"], rows["text"])


@functools.cache
def query_variables() -> Any:
  init = jax.jit(Queries().init)
  return init(jax.random.key(1), batch()["image"], batch()["text"])


def log_probs_by_hand(row: Any) -> np.ndarray:
  """Returns [labels, V] of one row, computed from the full sequence."""
  rows = jax.device_get(batch())
  source = [int(x) for x in rows["text"][row] if x != PAD]
  labels = rows["labels"][row][: rows["label_length"][row]].tolist()
  prompt = source[:-1] if rows["task"][row] == VQA else [BOS]
  table = np.asarray(decoder_variables()["params"]["embed_tokens"])
  tokens = prompt + labels[:-1]
  places = 1.0 + np.arange(len(tokens))[:, None]
  states = np.cumsum(table[tokens] * places, axis=0) / places
  states += rows["image"][row].mean((0, 1))[0]
  states += table[rows["text"][row]].mean(0)
  return log_softmax(np.tanh(states[len(prompt) - 1 :]) @ table[:V].T)
