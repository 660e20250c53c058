"""The formats of official weights."""

import dataclasses
import math
import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.files.store_cache import local_copy
from narvl_jax.files.stores import as_path, is_remote
from narvl_jax.interop.safetensors_file import read_safetensors
from narvl_jax.interop.tensors import PathLike, Tensor, check_bytes
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.terminal.progress import doing

# Files of a Hugging Face folder, in order of preference.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# At most three keys, of the tied table, share bytes.
_MAX_SHARING = 4


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A state dict in a file.

  Attributes:
    state: key in the file -> tensor.
    settings: "cfg" and "args" of fairseq, None without them.
    origin: the file that was named, of which `path` may be a local copy.
  """

  path: pathlib.Path
  state: dict[str, Tensor]
  settings: dict[str, Any] | None
  origin: pathlib.Path


def open_source(path: PathLike, *, ema: bool = False) -> SourceFile:
  """Opens an official file, or a folder of the Hugging Face port.

  Args:
    path: a file of `torch.save` or safetensors, or a folder that contains one.
    ema: read the moving averages instead of the weights of the last update.

  Raises:
    UserError: there is no such file, it is damaged, or it has no weights.
  """
  file = as_path(path)
  # Unlike `is_dir`, it returns False for names that cannot exist.
  if file.is_dir() if is_remote(file) else os.path.isdir(file):
    found = [file / name for name in _WEIGHTS if (file / name).is_file()]
    if not found:
      hint = ""
      if (file / "checkpoints").is_dir():
        hint = "; a run is written to a file: --to=FILE.pt"
      raise UserError(
        f"--from={path} is a folder without {' and '.join(_WEIGHTS)}{hint}"
      )
    file = found[0]
  if not is_remote(file):
    return _read(file, file, path, ema)
  copy = _copied(file)
  try:
    return _read(copy, file, path, ema)
  except UserError as error:
    # Users do not know the copy.
    raise UserError(str(error).replace(str(copy), str(file))) from error


def _read(
  file: pathlib.Path, origin: pathlib.Path, path: PathLike, ema: bool
) -> SourceFile:
  """Reads a file; `path` is what the user named."""
  settings = None
  if file.suffix == ".safetensors":
    content: Any = read_safetensors(file)
  else:
    content = read_torch(file)
    content, settings = _state_dict(file, content, ema)
  if ema and settings is None:
    raise UserError(
      f"--from={path} is not of fairseq and has no moving averages; leave"
      " --ema out"
    )
  if not content:
    raise UserError(f"--from={path} has no tensors")
  for key, value in content.items():
    if not isinstance(key, str) or not isinstance(value, Tensor):
      raise UserError(
        f"--from={path} has no state dict: {key} is not a tensor but of type"
        f" {type(value).__name__}"
      )
    if not math.prod(value.shape):
      raise UserError(
        f"--from={path}: {key} has the shape {list(value.shape)}, which"
        " contains"
        " no values"
      )
  total, size = sum(x.nbytes for x in content.values()), file.stat().st_size
  if total > _MAX_SHARING * size:
    raise UserError(
      f"--from={path} describes tensors of {total:,} bytes in a file of"
      f" {size:,}; official files share only the table of tokens"
    )
  check_bytes(content)
  return SourceFile(file, dict(content), settings, origin)


def _copied(path: pathlib.Path) -> pathlib.Path:
  """Returns a local copy of a file in a store, whose tensors are mapped."""
  try:
    with doing(f"copying {path}"):
      return local_copy(path)
  except FileNotFoundError as error:
    raise UserError(f"--from={path}: there is no such file") from error
  except OSError as error:
    raise UserError(
      f"--from={path} cannot be read: {error.strerror}"
    ) from error


def _state_dict(
  path: pathlib.Path, content: Any, ema: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the state dict of a file, and the settings of fairseq."""
  if not isinstance(content, dict):
    raise UserError(
      f"--from={path} contains a {type(content).__name__}, not a state dict"
    )
  if not isinstance(content.get("model"), dict):
    return content, None
  state = dict(content["model"])
  if ema:
    extra = content.get("extra_state")
    averages = extra.get("ema") if isinstance(extra, dict) else None
    if not isinstance(averages, dict):
      raise UserError(
        f"--from={path} has no moving averages (extra_state.ema); leave --ema"
        " out"
      )
    unknown = sorted(set(averages) - set(state))
    if unknown:
      raise UserError(
        f"--from={path}: {unknown[0]} has a moving average but is not a tensor"
        " of the model"
      )
    state |= averages
  names = ("args", "cfg")
  kept = {name: _plain(content[name]) for name in names if name in content}
  return state, kept


def _plain(value: Any) -> Any:
  """Replaces objects that were not read by None."""
  if isinstance(value, types.SimpleNamespace):
    return types.SimpleNamespace(**_plain(vars(value)))
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return type(value)(map(_plain, value))
  plain = (str, int, float, bool, type(None))
  return value if isinstance(value, plain) else None


def setting(settings: dict[str, Any] | None, name: str) -> Any:
  """Returns a setting of the model, None if it is missing."""
  for holder in (settings or {}).values():
    model = holder.get("model") if isinstance(holder, dict) else holder
    value = getattr(model, name, None)
    if value is not None:
      return value
  return None
