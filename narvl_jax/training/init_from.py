"""Weights of another run, or converted ones, as the start of a new run.

A parallel model and its autoregressive twin have one tree but for the queries
and the row of blank in the tied table, so each can start from the other.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen import meta

from narvl_jax import experiment as experiment_lib
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import VOCABULARY_FOLDER
from narvl_jax.parallel import replicated
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.optimizer import flatten, split_frozen
from narvl_jax.training.setup import Setup
from narvl_jax.training.train_state import TrainState
from narvl_jax.training.weights import opened, read_weights

# Parameters that an error names.
_SHOWN = 3
_TABLE = "params/embed_tokens"
# Only parallel models have it.
_QUERIES = "params/decoder/query_embed"

Shapes = Mapping[str, tuple[int, ...]]


def check_init_from(setup: Setup) -> list[str]:
  """Checks that the weights of `config.init_from` fit, before a run starts.

  Returns:
    A sentence about what is not taken from there, if that is not everything.

  Raises:
    UserError: the folder holds no weights, those of another model, or those
      of another vocabulary.
  """
  path = setup.experiment.config.init_from
  words = pathlib.Path(path) / VOCABULARY_FOLDER
  with opened(path, "init_from") as (checkpoints, step):
    stored = _shapes(checkpoints.shapes(step)["params"])
  _check_shapes(setup, stored)
  if words.is_dir():
    theirs = Vocabulary.load(words).fingerprint
    ours = setup.experiment.vocabulary.fingerprint
    if theirs != ours:
      raise UserError(
        f'init_from="{path}" has another vocabulary ({theirs[:12]}, this run'
        f" {ours[:12]}), so its embeddings mean other words; take that one:"
        f" --config.vocabulary.source=run --config.vocabulary.path={path}"
      )
  return _notes(setup, stored)


def init_from(setup: Setup, state: TrainState) -> TrainState:
  """Puts the weights of `config.init_from` into a fresh state.

  Args:
    setup: of the run.
    state: before the first update; its optimizer state stays.

  Returns:
    The state with these parameters and running statistics, and with moving
    averages that start from them. Where that run had moving averages, those
    are taken. From a model with the other kind of decoder all is taken but
    the queries and the rows of the table from blank on.

  Raises:
    UserError: see `check_init_from`.
  """
  wanted = flatten(_variables(setup))
  shardings = flatten(
    {
      "params": setup.shardings.params,
      "batch_stats": setup.shardings.batch_stats,
    }
  )

  def target(name: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    like = wanted.get(name)
    if like is not None and like.shape == shape:
      return jax.ShapeDtypeStruct(shape, like.dtype, sharding=shardings[name])
    whole = replicated(setup.mesh)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)

  with opened(setup.experiment.config.init_from, "init_from") as (
    checkpoints,
    step,
  ):
    stored = _shapes(checkpoints.shapes(step)["params"])
    _check_shapes(setup, stored)
    tree = {name: target(name, shape) for name, shape in stored.items()}
    tree = flax.traverse_util.unflatten_dict(tree, sep="/")
    read = read_weights(checkpoints, step, {"batch_stats": {}, **tree})
  if _from_twin(setup, stored):
    read = _without_blank(setup, state, read)
  averages = None
  if state.ema is not None:
    trained, _ = split_frozen(read["params"], setup.rules)
    # Copies: two leaves in one buffer could not both be donated.
    averages = jax.tree.map(
      jnp.copy, {"params": trained, "batch_stats": read["batch_stats"]}
    )
  return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
    params=read["params"], batch_stats=read["batch_stats"], ema=averages
  )


def _variables(setup: Setup) -> dict[str, Any]:
  """Returns the shapes of parameters and running statistics."""
  state = setup.abstract_state
  return meta.unbox({"params": state.params, "batch_stats": state.batch_stats})


def _shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  return {name: tuple(x.shape) for name, x in flatten(tree).items()}


def _from_twin(setup: Setup, stored: Shapes) -> bool:
  """Returns whether the weights are of a model with the other decoder."""
  return (_QUERIES in stored) == setup.experiment.autoregressive


def _words(setup: Setup) -> int:
  """Returns the rows of the table that a model and its twin share."""
  # Blank is the last id.
  return setup.experiment.vocabulary.size - 1


def _without_blank(
  setup: Setup, state: TrainState, read: Mapping[str, Any]
) -> dict[str, Any]:
  """Joins what the twin has with what is fresh."""
  fresh = flatten({"params": state.params})
  names = flatten(_variables(setup)).keys()
  taken = flatten(read)
  joined = {name: taken.get(name, fresh.get(name)) for name in names}
  words = _words(setup)

  @functools.partial(jax.jit, out_shardings=fresh[_TABLE].sharding)
  def join(fresh: jax.Array, taken: jax.Array) -> jax.Array:
    return fresh.at[:words].set(taken[:words])

  joined[_TABLE] = join(fresh[_TABLE], taken[_TABLE])
  tree = flax.traverse_util.unflatten_dict(joined, sep="/")
  return {"batch_stats": {}, **tree}


def _notes(setup: Setup, stored: Shapes) -> list[str]:
  """Says what stays as it was initialised."""
  if not _from_twin(setup, stored):
    return []
  path, words = setup.experiment.config.init_from, _words(setup)
  rows = f"the rows of embed_tokens from {words:,} on"
  if setup.experiment.autoregressive:
    return [f'init_from="{path}" is a parallel model: {rows} stay fresh']
  return [
    f'init_from="{path}" is an autoregressive model: decoder/query_embed and'
    f" {rows}, blank and padding, stay fresh"
  ]


def _check_shapes(setup: Setup, stored: Shapes) -> None:
  """Raises UserError unless two trees have the same leaves and shapes."""
  path = setup.experiment.config.init_from
  theirs, ours = dict(stored), _shapes(_variables(setup))
  if _from_twin(setup, stored):
    for shapes in (theirs, ours):
      shapes.pop(_QUERIES, None)
    if _TABLE in theirs:
      rows, width = theirs[_TABLE]
      # The padding of the tables may differ.
      if rows == _rows_of_twin(setup):
        theirs[_TABLE] = (ours[_TABLE][0], width)
  different = [
    f"{name} has {_shape(theirs, name)} there and {_shape(ours, name)} here"
    for name in sorted(theirs.keys() | ours.keys())
    if theirs.get(name) != ours.get(name)
  ]
  if different:
    shown = ", ".join(different[:_SHOWN])
    more = len(different) - _SHOWN
    shown += f" and {more} more" if more > 0 else ""
    raise UserError(
      f'init_from="{path}" is of another model: {shown}; set config.model and'
      f" config.vocabulary as in {path}/config.json (--config.init_from)"
    )


def _rows_of_twin(setup: Setup) -> int:
  """Returns the rows that the table there must have with our vocabulary."""
  experiment = setup.experiment
  folder = pathlib.Path(experiment.config.init_from)
  config = experiment.config.copy_and_resolve_references()
  config.model.decoder = (
    "parallel" if experiment.autoregressive else "autoregressive"
  )
  if workdir_lib.is_run(folder):
    config = workdir_lib.read_config(folder)
  model = experiment_lib.resolve_model_config(config, experiment.vocabulary)
  return model.padded_vocab_size


def _shape(shapes: Shapes, name: str) -> str:
  if name not in shapes:
    return "nothing"
  return "x".join(map(str, shapes[name])) or "a number"
