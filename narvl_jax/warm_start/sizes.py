"""Tables of another shape, and how a run starts from them.

| table                       | differs in      | what is copied          |
| --------------------------- | --------------- | ----------------------- |
| queries, text positions     | number          | the first rows          |
| tokens                      | vocabulary      | rows of the same tokens |
| positions of image tokens,  | rows            | rows of both            |
| and distances between them  | size of picture | all, resized            |

Converted weights do not record the size of their pictures, so they are not
resized here but by `narvl_jax.convert --stretch_images`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import experiment as experiment_lib
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.files.stores import as_path
from narvl_jax.models import ModelConfig, resizing
from narvl_jax.models.resizing import Grid
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.warm_start.tokens import match_tokens, same_ids

TABLE = "params/embed_tokens"
# Only in parallel models.
QUERIES = "params/decoder/query_embed"
_FIRST_ROWS = {
  QUERIES: "queries",
  "params/encoder/embed_positions": "text positions",
  "params/decoder/embed_positions": "answer positions",
}
_IMAGE_POSITIONS = "params/encoder/embed_image_positions"
_IMAGE_DISTANCES = "params/encoder/image_rel_pos_table"

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Origin:
  """The folder that a run starts from.

  Attributes:
    path: as the user wrote it.
    trained: whether it was trained by this program, not converted.
    parallel: whether its weights have queries.
  """

  path: str
  config: Config | None
  vocabulary: Vocabulary | None
  trained: bool
  parallel: bool

  @property
  def named(self) -> str:
    """Its name in messages."""
    return f'init_from="{self.path}"'


@dataclasses.dataclass(frozen=True)
class Fit:
  """Makes an array from a stored one of another shape.

  Attributes:
    join: (initial array of this run, stored array) -> array of this run.
    note: what is copied and what starts fresh.
  """

  join: Callable[[jax.Array, jax.Array], jax.Array]
  note: str


def read_origin(path: str, *, parallel: bool) -> Origin:
  """Describes the folder of a run or of converted weights.

  Raises:
    UserError: its config or its vocabulary is damaged.
  """
  folder = as_path(path)
  words = folder / VOCABULARY_FOLDER
  is_run = workdir_lib.is_run(folder)
  return Origin(
    path=path,
    config=workdir_lib.read_config(folder) if is_run else None,
    vocabulary=Vocabulary.load(words) if words.is_dir() else None,
    trained=(folder / workdir_lib.ENVIRONMENT_FILE).exists(),
    parallel=parallel,
  )


def find_fit(
  experiment: Experiment, origin: Origin, name: str, theirs: Shape, ours: Shape
) -> Fit | None:
  """Returns how a stored array becomes ours; None if unchanged or impossible.

  Raises:
    UserError: the vocabulary there does not belong to the weights.
  """
  if len(theirs) != len(ours):
    return None
  if name == TABLE:
    return _fit_tokens(experiment, origin, theirs, ours)
  if name in _FIRST_ROWS and theirs[1:] == ours[1:]:
    return _fit_first_rows(_FIRST_ROWS[name], theirs[0], ours[0])
  if name == _IMAGE_POSITIONS and theirs[1:] == ours[1:]:
    sides = [resizing.positions_side(shape[0]) for shape in (theirs, ours)]
    return _fit_image(
      experiment, origin, "image positions", sides, resizing.resize_positions
    )
  if name == _IMAGE_DISTANCES and theirs[::2] == ours[::2]:
    sides = [resizing.distances_side(shape[1]) for shape in (theirs, ours)]
    return _fit_image(
      experiment,
      origin,
      "distances of image tokens",
      sides,
      resizing.resize_distances,
    )
  return None


def _fit_first_rows(what: str, theirs: int, ours: int) -> Fit | None:
  if theirs == ours:
    return None

  def join(fresh: jax.Array, taken: jax.Array) -> jax.Array:
    both = min(theirs, ours)
    return fresh.at[:both].set(taken[:both])

  note = f"the first {min(theirs, ours)} of its {theirs} {what} are copied"
  if ours > theirs:
    note += f", {ours - theirs} more start fresh"
  return Fit(join, note)


def _fit_tokens(
  experiment: Experiment, origin: Origin, theirs: Shape, ours: Shape
) -> Fit | None:
  """Fits the table of tokens, by token names if the vocabularies differ."""
  if theirs[1:] != ours[1:]:
    return None
  vocabulary = experiment.vocabulary
  same = (
    origin.vocabulary is None
    or origin.vocabulary.fingerprint == vocabulary.fingerprint
  )
  # The blank, the last id, is not a class of an autoregressive model.
  parallel = not experiment.autoregressive
  if same:
    if origin.parallel == parallel and theirs == ours:
      return None
    # Without a vocabulary, a table as long as ours needs is assumed to be ours.
    if theirs[0] not in (ours[0], _rows_there(experiment, origin)):
      return None
    both = vocabulary.size - int(not (parallel and origin.parallel))
    note = f"the rows of embed_tokens from {both:,} on"
    note += ", blank and padding, stay fresh" if parallel else " stay fresh"
    return Fit(_join_rows(same_ids(ours[0], both)), note)
  assert origin.vocabulary is not None
  classes = (
    origin.vocabulary.size - int(not origin.parallel),
    vocabulary.size - int(not parallel),
  )
  if classes[0] > theirs[0]:
    raise UserError(
      f"{origin.named}: the vocabulary there has {origin.vocabulary.size:,}"
      f" ids, but embed_tokens {theirs[0]:,} rows, so it is not that of these"
      f" weights; put the right one into {origin.path}/{VOCABULARY_FOLDER}, or"
      " copy no words by --config.init_drops='(\"embed_tokens\",)'"
    )
  matches = match_tokens(
    origin.vocabulary, vocabulary, classes=classes, rows=ours[0]
  )
  note = f"it has another vocabulary: {matches.note()}"
  if matches.missing:
    note += (
      "; to use all of its words, --config.vocabulary.source=run"
      f" --config.vocabulary.path={origin.path}"
    )
  return Fit(_join_rows(matches.rows), note)


def _join_rows(rows: np.ndarray) -> Callable[..., jax.Array]:
  """Returns a join that copies the given rows; -1 keeps the initial row."""

  def join(fresh: jax.Array, taken: jax.Array) -> jax.Array:
    chosen = taken[jnp.asarray(np.maximum(rows, 0))]
    return jnp.where(jnp.asarray(rows >= 0)[:, None], chosen, fresh)

  return join


def _rows_there(experiment: Experiment, origin: Origin) -> int:
  """Returns the length that a table of our vocabulary would have there."""
  config = origin.config or experiment.config
  config = config.copy_and_resolve_references()
  config.model.decoder = "parallel" if origin.parallel else "autoregressive"
  model = experiment_lib.resolve_model_config(config, experiment.vocabulary)
  return model.padded_vocab_size


def _fit_image(
  experiment: Experiment,
  origin: Origin,
  what: str,
  sides: list[int | None],
  resize: Callable[..., jax.Array],
) -> Fit | None:
  """Fits a table of image tokens; `sides` are the grids that it can hold."""
  theirs, ours = sides
  if theirs is None or ours is None:
    return None
  new = grid_of(experiment.config, experiment.model_config)
  old = new
  if origin.trained and origin.config is not None:
    # Only the image stride of this model is used.
    model = experiment_lib.resolve_model_config(
      origin.config, origin.vocabulary or experiment.vocabulary
    )
    old = grid_of(origin.config, model)
  if old == new and theirs == ours:
    return None
  if max(old) > theirs:
    return None
  one = functools.partial(resize, old=old, new=new)

  def join(fresh: jax.Array, taken: jax.Array) -> jax.Array:
    # Tables of distances are stacked by layer.
    return jax.vmap(one)(taken, fresh) if fresh.ndim > 2 else one(taken, fresh)

  parts = []
  if old != new:
    parts.append(
      f"of the grid {old[0]}x{old[1]} stretched to {new[0]}x{new[1]}"
    )
  if theirs != ours:
    parts.append(f"from a table for {theirs}x{theirs} to one for {ours}x{ours}")
  return Fit(join, f"{what} {', '.join(parts)}")


def grid_of(config: Config, model: ModelConfig) -> Grid:
  """Returns rows and columns of the image tokens of a run."""
  height, width = (
    math.ceil(side / model.image_stride) for side in config.data.image_size
  )
  return height, width
