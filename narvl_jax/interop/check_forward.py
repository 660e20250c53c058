"""A forward pass on a fixed request, to compare two machines."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.models import ModelConfig, make_model
from narvl_jax.terminal.tables import format_columns

_SIDE = 256
_TOKENS = 12


def request(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
  """Returns the fixed picture and prompt, both integers.

  Returns:
    Picture uint8 [1, 256, 256, 3], smaller if the position tables are, and ids
    int32 [1, 12] that every vocabulary has.
  """
  side = min(_SIDE, 16 * config.image_bucket_size)
  y, x, c = np.ogrid[:side, :side, :3]
  image = (3 * y + 7 * x + (x * y) // 16 + 50 * c) % 256
  ids = 4 + (np.arange(_TOKENS) * 37) % max(config.vocab_size - 5, 1)
  ids[0], ids[-1] = 0, 2
  return image[None].astype(np.uint8), ids[None].astype(np.int32)


def forward(
  config: ModelConfig, variables: Mapping[str, Any]
) -> dict[str, list[float]]:
  """Runs the fixed request in float32.

  Args:
    config: the architecture.
    variables: {"params", "batch_stats"}.

  Returns:
    "encoder_out", "decoder_out" and "logits": mean, root mean square and three
    values; "best ids" of every query or, of the autoregressive decoder, of
    every token of the prompt.
  """
  image, text = request(config)
  model = make_model(config)
  decoder_input = () if config.decoder == "parallel" else (text,)

  @jax.jit
  def run(variables: Any, image: jax.Array, text: jax.Array) -> Any:
    # Inside of jit, so that only one float32 copy exists.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    logits, parts = model.apply(wide, image, text, *decoder_input)  # pyright: ignore
    return {
      "encoder_out": parts["encoder_out"],
      "decoder_out": parts["decoder_out"],
      "logits": logits,
    }

  with jax.default_matmul_precision("highest"):
    out = jax.device_get(run(dict(variables), image, text))
  table = {}
  for name, value in out.items():
    wide = value.astype(np.float64)
    numbers = [wide.mean(), np.sqrt(np.square(wide).mean())]
    table[name] = [float(x) for x in (*numbers, *wide.reshape(-1)[:3])]
  table["best ids"] = [int(i) for i in out["logits"][0].argmax(-1)]
  return table


def format_forward(table: Mapping[str, list[float]]) -> str:
  """Returns the table as text."""
  rows: list[Sequence[str]] = [("", "mean", "rms", "[0]", "[1]", "[2]")]
  for name, values in table.items():
    if name != "best ids":
      rows.append((name, *(f"{x:.6g}" for x in values)))
  ids = " ".join(str(int(i)) for i in table["best ids"])
  return f"{format_columns(rows, rule=False)}\nbest ids  {ids}"
