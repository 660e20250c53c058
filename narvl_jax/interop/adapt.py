"""Changes to official weights before they are converted.

Weights of OFA lack the queries and the blank of NARVL. Other changes are
options.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from narvl_jax.errors import UserError, check_counts, did_you_mean
from narvl_jax.interop.key_map import TABLE_KEY
from narvl_jax.interop.settings import (
  IMAGE_POSITIONS_KEY,
  QUERY_KEY,
  settings_of,
)
from narvl_jax.interop.tensors import Tensor
from narvl_jax.models import positions
from narvl_jax.models.resizing import Grid, resize_distances, resize_positions
from narvl_jax.models.sizes import DECODERS

BLANK_ROWS = ("noise", "mean", "unk")
_UNK_ID = 3
_QUERY_STDDEV = 0.02
DEFAULT_QUERIES = 20


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a conversion.

  Attributes:
    decoder: "parallel" or None makes a NARVL of any file, "autoregressive"
      keeps the decoder of OFA.
    num_queries: N; None keeps that of the file, or 20 if it has none.
    blank_row: initial row of the blank if the file has none: "noise"
      (reference: normal, standard deviation D ** -0.5), "mean" of all rows,
      or the row of "unk".
    stretch_images: (from, to), sides in pixels: image positions are resized by
      bicubic interpolation; None keeps them (reference).
    seed: seed of all random values.
  """

  decoder: str | None = None
  num_queries: int | None = None
  blank_row: str = "noise"
  stretch_images: tuple[int, int] | None = None
  seed: int = 0

  def __post_init__(self) -> None:
    if self.decoder is not None and self.decoder not in DECODERS:
      raise UserError(
        f'--decoder="{self.decoder}" is unknown.'
        f"{did_you_mean(self.decoder, DECODERS)} (--decoder)"
      )
    if self.autoregressive:
      self._check_nothing_new()
    check_counts(num_queries=self.num_queries)
    check_counts(least=0, seed=self.seed)
    if self.blank_row not in BLANK_ROWS:
      raise UserError(
        f'--blank_row="{self.blank_row}" is unknown.'
        f"{did_you_mean(self.blank_row, BLANK_ROWS)} (--blank_row)"
      )
    for pixels in self.stretch_images or ():
      if pixels < 32 or pixels % 16:
        near = max(32, round(pixels / 16) * 16)
        raise UserError(
          f"--stretch_images: {pixels} is not a multiple of 16 from 32 on;"
          f" nearest valid: {near}"
        )

  @property
  def autoregressive(self) -> bool:
    """Whether the decoder of OFA is kept."""
    return self.decoder == "autoregressive"

  def _check_nothing_new(self) -> None:
    """Raises UserError for an option that only NARVL has."""
    blank = self.blank_row
    for flag, given in (
      (f"--num_queries={self.num_queries}", self.num_queries is not None),
      (f"--blank_row={blank}", blank != BLANK_ROWS[0]),
    ):
      if given:
        raise UserError(
          f"{flag} has no meaning with --decoder=autoregressive, which has"
          " neither queries nor a blank; leave it out"
        )


def with_config(options: Options, config: Any) -> Options:
  """Returns options completed by the config of a run.

  Raises:
    UserError: the two contradict each other.
  """
  options = _merge(options, "decoder", config.model.decoder)
  if options.autoregressive:
    return options  # It has no queries.
  return _merge(options, "num_queries", config.model.num_queries)


def _merge(options: Options, name: str, wanted: Any) -> Options:
  given = getattr(options, name)
  if wanted is None or wanted == given:
    return options
  if given is not None:
    raise UserError(
      f"--{name}={given}, but --config has model.{name}={wanted}; leave"
      f" --{name} out, or set --config.model.{name}={given}"
    )
  return dataclasses.replace(options, **{name: wanted})


@dataclasses.dataclass(frozen=True)
class Adaptation:
  """A tensor that the file lacks or has in another shape.

  Attributes:
    before: shape in the file, None if it is missing.
    how: how it was filled, for the report.
  """

  key: str
  before: tuple[int, ...] | None
  after: tuple[int, ...]
  how: str


def adapt(
  state: dict[str, Tensor | np.ndarray], options: Options
) -> tuple[dict[str, Tensor | np.ndarray], list[Adaptation], bool]:
  """Adds and resizes tensors that the model needs.

  Args:
    state: official key -> tensor; not modified.

  Returns:
    The new state dict, its changes, and whether the file is of OFA.

  Raises:
    UserError: an option does not fit the file.
  """
  if TABLE_KEY not in state or len(np.shape(state[TABLE_KEY])) != 2:
    raise UserError(
      f"--from: there is no {TABLE_KEY}, so these are no weights of OFA or"
      " NARVL"
    )
  work = _Adaptation(dict(state), options)
  of_ofa = QUERY_KEY not in state
  if options.autoregressive and not of_ofa:
    raise UserError(
      f"--decoder=autoregressive, but the weights are of NARVL: they have"
      f" {QUERY_KEY}; nearest valid: --decoder=parallel (--decoder or, of"
      " --config, model.decoder)"
    )
  if not options.autoregressive:
    if of_ofa:
      work.add_blank()
    work.fit_queries()
  work.complete_image_positions()
  if options.stretch_images is not None:
    work.stretch_images(*options.stretch_images)
  return work.state, work.changes, of_ofa


class _Adaptation:
  """A state dict while it is being changed."""

  def __init__(
    self, state: dict[str, Tensor | np.ndarray], options: Options
  ) -> None:
    self.state, self.options = state, options
    self.changes: list[Adaptation] = []
    table = state[TABLE_KEY]
    self.width: int = table.shape[1]
    self.dtype = table.dtype

  def _set(self, key: str, value: np.ndarray, how: str) -> None:
    before = self.state.get(key)
    shape = None if before is None else tuple(before.shape)
    self.changes.append(Adaptation(key, shape, value.shape, how))
    self.state[key] = value.astype(self.dtype)

  def _normal(self, key: str, rows: int, stddev: float) -> np.ndarray:
    """Draws rows that depend only on the seed and the key."""
    seed = [self.options.seed, zlib.crc32(key.encode())]
    rng = np.random.default_rng(seed)
    return stddev * rng.standard_normal((rows, self.width), np.float32)

  def add_blank(self) -> None:
    """Appends the blank to the vocabulary."""
    table = np.asarray(self.state[TABLE_KEY])
    how = f"last row is the blank, from {self.options.blank_row}"
    match self.options.blank_row:
      case "noise":
        row = self._normal(TABLE_KEY, 1, self.width**-0.5)
        how += f" with seed {self.options.seed}"
      case "mean":
        row = table.mean(0, np.float32, keepdims=True)
      case _:
        row = table[_UNK_ID : _UNK_ID + 1]
    self._set(TABLE_KEY, np.concatenate([table, row.astype(self.dtype)]), how)

  def fit_queries(self) -> None:
    """Cuts, extends or creates the queries."""
    old = self.state.get(QUERY_KEY)
    have = 0 if old is None else old.shape[0]
    want = self.options.num_queries or have or DEFAULT_QUERIES
    limit = settings_of(self.state).get("max_text_positions", want)
    if want > limit:
      raise UserError(
        f"--num_queries={want} exceeds the {limit} positions of the file;"
        f" nearest valid: --num_queries={limit}"
      )
    if want == have:
      return
    rows = self._normal(QUERY_KEY, want, _QUERY_STDDEV)[min(have, want) :]
    drawn = f"normal, stddev {_QUERY_STDDEV}, seed {self.options.seed}"
    if old is None:
      self._set(QUERY_KEY, rows, f"{want} new queries, {drawn}")
      return
    kept = np.asarray(old)[:want]
    how = f"first {len(kept)} of {have} queries kept"
    if want > have:
      how += f", {want - have} new ones {drawn}"
    value = np.concatenate([kept, rows.astype(self.dtype)])
    self._set(QUERY_KEY, value, how)

  def complete_image_positions(self) -> None:
    """Appends the rows that early files lack, as the official code does."""
    side = settings_of(self.state).get("image_bucket_size", 0)
    table = self.state.get(IMAGE_POSITIONS_KEY)
    missing = 0 if table is None else side**2 + 1 - table.shape[0]
    if table is None or missing <= 0:
      return
    rows = self._normal(IMAGE_POSITIONS_KEY, missing, self.width**-0.5)
    value = np.concatenate([np.asarray(table), rows.astype(self.dtype)])
    how = f"{missing} rows appended, normal, seed {self.options.seed}"
    self._set(IMAGE_POSITIONS_KEY, value, how)

  def stretch_images(self, before: int, after: int) -> None:
    """Interpolates positions and relative distances of image tokens."""
    old, new = before // 16, after // 16
    side: int = settings_of(self.state).get("image_bucket_size", 0)
    if old > side:
      raise UserError(
        f"--stretch_images: the tables of the file reach to {16 * side}"
        f" pixels, not to {before}; nearest valid: {16 * side}"
      )
    grown = max(side, new)
    how = f"bicubic, the grid of {old} x {old} to {new} x {new}"
    grids = (old, old), (new, new)
    rows = positions.num_image_positions(grown)
    self._resize(IMAGE_POSITIONS_KEY, resize_positions, rows, grids, how)
    rows = positions.num_image_buckets(grown)
    for layer in range(settings_of(self.state)["encoder_layers"]):
      key = f"encoder.image_rel_pos_table_list.{layer}.weight"
      self._resize(key, resize_distances, rows, grids, how)

  def _resize(
    self,
    key: str,
    resize: Callable[..., jax.Array],
    rows: int,
    grids: tuple[Grid, Grid],
    how: str,
  ) -> None:
    """Resizes a table to `rows` rows; those that nothing fills are zero."""
    table = np.asarray(self.state[key])
    empty = np.zeros((rows, table.shape[1]), table.dtype)
    self._set(key, np.asarray(resize(table, empty, *grids)), how)
