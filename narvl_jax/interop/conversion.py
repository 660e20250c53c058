"""Official weights as variables of a model, with a report."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import flax.traverse_util
import ml_dtypes
import numpy as np

from narvl_jax.errors import UserError
from narvl_jax.files.regular import sha256_of
from narvl_jax.interop.adapt import Adaptation, Options, adapt
from narvl_jax.interop.key_map import IGNORED, TABLE_KEY, TIED_KEYS, key_map
from narvl_jax.interop.names import Renamed, official_names
from narvl_jax.interop.official import untied, variables_from_official
from narvl_jax.interop.settings import settings_of, size_of
from narvl_jax.interop.source_file import SourceFile, open_source
from narvl_jax.interop.tensors import PathLike, Tensor
from narvl_jax.models import ModelConfig, model_config

_KEPT_DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)


@dataclasses.dataclass(frozen=True)
class Conversion:
  """Converted weights.

  Attributes:
    size: named size of the model.
    overrides: fields of `ModelConfig` that differ from that size.
    variables: {"params", "batch_stats"} of NumPy arrays.
    unused: official tensors that only an official file needs.
    report: JSON values, see `report.json` in docs/weights.md.
  """

  source: SourceFile
  size: str
  overrides: dict[str, Any]
  config: ModelConfig
  variables: dict[str, Any]
  unused: dict[str, Tensor | np.ndarray]
  report: dict[str, Any]


def convert_official(
  path: PathLike,
  options: Options | None = None,
  *,
  ema: bool = False,
  dtype: Any = None,
) -> Conversion:
  """Reads official weights of OFA or NARVL.

  Args:
    path: an official file or a Hugging Face folder, see `open_source`.
    ema: read the moving averages.
    dtype: dtype of the variables; None keeps float16, bfloat16 and float32.

  Raises:
    UserError: a tensor has no place, or one is missing.
  """
  options = options or Options()
  source = open_source(path, ema=ema)
  with _naming(source.origin):
    renamed = official_names(source.state)
    state, changes, of_ofa = adapt(untied(renamed.state), options)
    settings = settings_of(state)
    size, overrides = size_of(settings)
    config = model_config(size, **settings)
    unused = {key: x for key, x in state.items() if _is_unused(key)}
    if dtype is None:
      dtype = _common_dtype(x for key, x in state.items() if key not in unused)
    variables = variables_from_official(state, config, dtype=dtype)
  report = {
    "source": {
      "file": str(source.origin),
      "bytes": source.path.stat().st_size,
      "sha256": sha256_of(source.path),
      "weights": "moving averages" if ema else "model",
      "format": "Hugging Face" if renamed.hugging_face else "official",
      "model": "OFA" if of_ofa else "NARVL",
    },
    "options": dataclasses.asdict(options),
    "model": {"size": size, **settings},
    "dtype": np.dtype(dtype).name,
    **_account(source, renamed, changes, variables, config),
  }
  return Conversion(source, size, overrides, config, variables, unused, report)


def load_official(
  path: PathLike, *, options: Options | None = None, ema: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
  """Reads official weights; see `convert_official`.

  Returns:
    The architecture, and {"params", "batch_stats"} of float32 NumPy arrays.

  Raises:
    UserError: a tensor has no place, or one is missing.
  """
  made = convert_official(path, options, ema=ema, dtype=np.float32)
  return made.config, made.variables


@contextlib.contextmanager
def _naming(path: PathLike) -> Iterator[None]:
  """Adds the file to errors about tensors, but not to those about flags."""
  try:
    # Otherwise NumPy warns and computes infinite positions.
    with np.errstate(divide="raise"):
      yield
  except UserError as error:
    text = str(error).removeprefix("--from: ")
    if text.startswith("--"):
      raise
    raise UserError(f"--from={path}: {text}") from error
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    # Inconsistent shapes can raise nearly any exception.
    raise UserError(
      f"--from={path}: the shapes of its tensors make no model of OFA or NARVL"
      f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    ) from error


def _is_unused(key: str) -> bool:
  """Returns whether only an official file needs a tensor."""
  return bool(IGNORED.fullmatch(key)) and not key.endswith("_rp_bucket")


def _common_dtype(tensors: Iterable[Tensor | np.ndarray]) -> Any:
  """Returns the one float type of all tensors, or float32."""
  dtypes = {x.dtype for x in tensors if x.dtype.kind not in "iub"}
  if len(dtypes) == 1:
    dtype = dtypes.pop()
    if dtype in _KEPT_DTYPES:
      return dtype
  return np.dtype(np.float32)


def _account(
  source: SourceFile,
  renamed: Renamed,
  changes: list[Adaptation],
  variables: dict[str, Any],
  config: ModelConfig,
) -> dict[str, Any]:
  """Reports the place of every tensor and the digest of every variable."""
  place = {
    key: "/".join(leaf.path)
    for leaf in key_map(config)
    for keys in leaf.keys
    for key in keys
  }
  used: dict[str, list[str]] = {}
  for official, key in renamed.sources.items():
    if official in place:
      used.setdefault(key, []).append(place[official])
    elif official in TIED_KEYS:
      used.setdefault(key, []).append(f"tied to {place[TABLE_KEY]}")
    elif _is_unused(official):
      used.setdefault(key, []).append("not read here, kept for the way back")
    elif IGNORED.fullmatch(official):
      used.setdefault(key, []).append("computed")
  for key in renamed.dropped:
    used[key] = ["dropped: no such head"]
  flat: dict[tuple[str, ...], Any] = flax.traverse_util.flatten_dict(variables)  # pyright: ignore
  digests = {"/".join(path): _digest(value) for path, value in flat.items()}
  whole = hashlib.sha256("".join(sorted(digests.values())).encode())
  return {
    "new_or_resized": [dataclasses.asdict(change) for change in changes],
    "tensors": {key: "; ".join(used[key]) for key in source.state},
    "variables": digests,
    "sha256": whole.hexdigest(),
  }


def _digest(value: np.ndarray) -> str:
  """Returns the first half of the SHA-256 of an array's bytes (hex)."""
  data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
  return hashlib.sha256(data.data).hexdigest()[:32]
