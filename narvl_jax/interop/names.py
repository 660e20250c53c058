"""Keys of other files, renamed to those of the official code."""

import dataclasses
import re

import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.interop.tensors import State, Tensor

# Renamed modules of a layer in the Hugging Face port of OFA.
_HUGGING_FACE = (
  ("encoder", "self_attn_mid_layer_norm", "attn_ln"),
  ("decoder", "self_attn_mid_layer_norm", "self_attn_ln"),
  ("decoder", "cross_attn_mid_layer_norm", "cross_attn_ln"),
  ("decoder", "cross_attn_layer_norm", "encoder_attn_layer_norm"),
  ("decoder", "cross_attn", "encoder_attn"),
  ("encoder", "ffn_layer_norm", "ffn_layernorm"),
  ("decoder", "ffn_layer_norm", "ffn_layernorm"),
)
# Early versions of fairseq numbered the norms of a layer.
_NUMBERED = {
  "encoder": ("self_attn_layer_norm", "final_layer_norm"),
  "decoder": (
    "self_attn_layer_norm",
    "encoder_attn_layer_norm",
    "final_layer_norm",
  ),
}
_LAYER = re.compile(r"(encoder|decoder)(\.layers\.\d+\.)([^.]+)(.*)")
_FUSED = re.compile(r"(.*\.)in_proj_(weight|bias)")
_DROPPED = re.compile(r"classification_heads\..*")


@dataclasses.dataclass(frozen=True)
class Renamed:
  """A state dict under official names.

  Attributes:
    state: official key -> tensor.
    sources: official key -> the key in the file.
    dropped: keys of the file that no model uses.
    hugging_face: whether the file has names of the Hugging Face port.
  """

  state: dict[str, Tensor | np.ndarray]
  sources: dict[str, str]
  dropped: tuple[str, ...]
  hugging_face: bool


def official_names(state: State) -> Renamed:
  """Renames and splits tensors as the official code does on loading.

  Raises:
    UserError: two tensors would get the same name, or the rows of a fused
      projection do not divide by three.
  """
  out: dict[str, Tensor | np.ndarray] = {}
  sources: dict[str, str] = {}
  dropped = []
  hugging_face = False
  for key, value in state.items():
    if _DROPPED.fullmatch(key):
      dropped.append(key)
      continue
    name = _official_name(key)
    hugging_face |= name != key and "layer_norms." not in key
    for part, tensor in _split(name, value):
      if part in out:
        raise UserError(
          f"--from: the tensors {sources[part]} and {key} are both {part}"
        )
      out[part], sources[part] = tensor, key
  return Renamed(out, sources, tuple(dropped), hugging_face)


def _official_name(key: str) -> str:
  match = _LAYER.fullmatch(key)
  if match is None:
    return key
  side, layer, part, rest = match.groups()
  if part == "layer_norms":
    number, _, rest = rest.removeprefix(".").partition(".")
    names = _NUMBERED[side]
    if not number.isdigit() or int(number) >= len(names):
      return key
    return f"{side}{layer}{names[int(number)]}.{rest}"
  for where, theirs, official in _HUGGING_FACE:
    if (side, part) == (where, theirs):
      return f"{side}{layer}{official}{rest}"
  return key


def _split(
  name: str, value: Tensor | np.ndarray
) -> list[tuple[str, Tensor | np.ndarray]]:
  """Splits a fused projection of queries, keys and values."""
  match = _FUSED.fullmatch(name)
  if match is None:
    return [(name, value)]
  rows = value.shape[0] if value.shape else 0
  if rows == 0 or rows % 3:
    raise UserError(
      f"--from: {name} has {rows} rows, which are not those of three"
      " projections"
    )
  whole = np.asarray(value)
  return [
    (f"{match[1]}{letter}_proj.{match[2]}", part)
    for letter, part in zip("qkv", np.split(whole, 3), strict=True)
  ]
