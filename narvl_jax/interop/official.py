"""Weights of the official PyTorch code, to and from the parameter tree."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from narvl_jax.errors import UserError, list_few
from narvl_jax.interop.key_map import IGNORED, TABLE_KEY, TIED_KEYS, key_map
from narvl_jax.interop.settings import settings_of
from narvl_jax.interop.tensors import State, same
from narvl_jax.models import ModelConfig, make_model

# Keys that a message names.
_SHOWN = 4
_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)


def variables_from_official(
  state: State, config: ModelConfig, *, dtype: Any = np.float32
) -> dict[str, Any]:
  """Converts an official state dict to variables of `make_model(config)`.

  Integer buffers and the decoder tables that only image generation reads are
  ignored. Rows that pad the tied table are zero.

  Args:
    state: official key -> float array, or a tensor of a file, read once.
    config: config of NARVL or, if autoregressive, of OFA;
      `image_encoder="resnet"`.

  Returns:
    {"params", "batch_stats"}: nested dicts of NumPy arrays, unboxed.

  Raises:
    UserError: a key is missing, left over, of another shape or no float, a
      value is not finite, or the tied tables differ.
  """
  leaves = key_map(config)
  state = untied(state)
  _check_state(state, config)
  flat = {}
  for leaf in leaves:
    layers = [
      _to_ours(
        leaf.transform,
        [_weight(state, key).astype(dtype) for key in keys],
        config,
      )
      for keys in leaf.keys
    ]
    flat[leaf.path] = np.stack(layers) if leaf.stacked else layers[0]
  return flax.traverse_util.unflatten_dict(flat)


def official_from_variables(
  variables: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
  """Converts variables of a model to the official keys and layouts.

  The exact inverse of `variables_from_official`, also for gradients, since
  every transform is a permutation. The tied table has three keys; integer
  buffers and decoder tables that only image generation reads are left out.

  Args:
    variables: {"params"} and optionally {"batch_stats"}, unboxed.

  Returns:
    Official key -> array of the same dtype and type (NumPy, JAX).
  """
  flat: dict[tuple[str, ...], Any]
  flat = flax.traverse_util.flatten_dict(dict(variables))  # pyright: ignore
  state = {}
  for leaf in key_map(config):
    if leaf.path[0] not in variables:
      continue
    value = flat[leaf.path]
    for layer, keys in enumerate(leaf.keys):
      part = value[layer] if leaf.stacked else value
      state |= zip(
        keys, _to_official(leaf.transform, part, config), strict=True
      )
  state |= {key: state[TABLE_KEY] for key in TIED_KEYS}
  return state


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns official key -> shape of every tensor that `config` reads."""
  return dict(_shapes(config))


@functools.lru_cache(maxsize=8)
def _abstract_variables(config: ModelConfig) -> dict[str, Any]:
  """Traces the initialisation, which takes a second or two."""

  def init() -> dict[str, Any]:
    image = jnp.zeros((1, 16, 16, 3))
    text = jnp.zeros((1, 1), jnp.int32)
    variables = make_model(config).init(jax.random.key(0), image, text)
    return nn.meta.unbox(variables)

  return jax.eval_shape(init)


@functools.lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  variables = _abstract_variables(config)
  made = jax.eval_shape(lambda v: official_from_variables(v, config), variables)
  return {key: x.shape for key, x in made.items()}


def _to_ours(
  transform: str, parts: Sequence[np.ndarray], config: ModelConfig
) -> np.ndarray:
  """Converts the official tensors of one layer; see `_to_official`."""
  heads, width = config.num_heads, config.head_width
  if transform == "fused_kernel":  # n times [H d, D] -> [D, n, H, d]
    stack = np.stack(parts)
    n, _, d = stack.shape
    return stack.transpose(2, 0, 1).reshape(d, n, heads, width)
  if transform == "fused_bias":  # n times [H d] -> [n, H, d]
    return np.stack(parts).reshape(len(parts), heads, width)
  (x,) = parts
  match transform:
    case "same":
      return x
    case "transpose":  # [out, in] -> [in, out]
      return x.T
    case "conv":  # OIHW -> HWIO
      return x.transpose(2, 3, 1, 0)
    case "merged_heads":  # [D, H d] -> [H, d, D]
      return x.T.reshape(heads, width, -1)
    case "vocabulary":  # [V, D] -> [padded V, D]
      return np.pad(x, ((0, config.padded_vocab_size - len(x)), (0, 0)))
  raise AssertionError(transform)


def _to_official(transform: str, x: Any, config: ModelConfig) -> list[Any]:
  """Inverts `_to_ours`; `x` may be an array of NumPy or JAX."""
  match transform:
    case "fused_kernel":
      d, n, heads, width = x.shape
      return list(x.transpose(1, 2, 3, 0).reshape(n, heads * width, d))
    case "fused_bias":
      return list(x.reshape(len(x), -1))
    case "same":
      return [x]
    case "transpose":
      return [x.T]
    case "conv":
      return [x.transpose(3, 2, 0, 1)]
    case "merged_heads":
      return [x.reshape(-1, x.shape[-1]).T]
    case "vocabulary":
      return [x[: config.vocab_size]]
  raise AssertionError(transform)


def _check_state(state: State, config: ModelConfig) -> None:
  """Raises UserError unless `state` has the keys and shapes of `config`."""
  shapes = official_shapes(config)
  hint = _hint(state, config)
  missing = [k for k in shapes if k not in state and k not in TIED_KEYS]
  if missing:
    raise UserError(
      f"official weights lack {len(missing)} of {len(shapes)} tensors: "
      f"{list_few(missing, _SHOWN)}{hint}"
    )
  for key, shape in shapes.items():
    if key not in TIED_KEYS and np.shape(state[key]) != shape:
      raise UserError(
        f"official weight {key} has shape {list(np.shape(state[key]))}, the "
        f"configuration makes {list(shape)}{hint}"
      )
  left = [k for k in state if k not in shapes and not IGNORED.fullmatch(k)]
  if left:
    raise UserError(
      f"official weights hold {len(left)} unknown tensors:"
      f" {list_few(left, _SHOWN)}{hint}"
    )


def untied(state: State) -> dict[str, Any]:
  """Returns a state dict with the tied table under `TABLE_KEY` only."""
  state = dict(state)
  for key in TIED_KEYS:
    tied = state.pop(key, None)
    if tied is not None and not same(tied, state.setdefault(TABLE_KEY, tied)):
      raise UserError(
        f"official weight {key} differs from {TABLE_KEY}; the model ties them"
      )
  return state


def _weight(state: State, key: str) -> np.ndarray:
  """Reads a tensor; raises UserError if it cannot be a weight."""
  value = np.asarray(state[key])
  if value.dtype not in _DTYPES:
    names = ", ".join(np.dtype(x).name for x in _DTYPES)
    raise UserError(
      f"official weight {key} has type {value.dtype.name}; valid: {names}"
    )
  finite = np.isfinite(value)
  if not finite.all():
    raise UserError(
      f"official weight {key} contains {finite.size - finite.sum():,} of"
      f" {finite.size:,} values that are NaN or infinite, so the file is"
      " damaged or its training failed; use another copy or checkpoint"
    )
  return value


def _hint(state: State, config: ModelConfig) -> str:
  """Returns the flags that would fit the config to the tensors."""
  flags = [
    f"--config.model.{name}={str(value).replace(' ', '')}"
    for name, value in settings_of(state).items()
    if value != getattr(config, name)
  ]
  return f"; nearest configuration: {' '.join(flags)}" if flags else ""
