"""Weights of another run, or converted ones, as the start of a new run."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen import meta

from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import VOCABULARY_FOLDER
from narvl_jax.training.checkpoints import (
  FOLDER,
  Checkpoints,
  choose_step,
  restore_target,
)
from narvl_jax.training.optimizer import flatten, split_frozen
from narvl_jax.training.setup import Setup
from narvl_jax.training.train_state import TrainState

# Parameters that an error names.
_SHOWN = 3


def check_init_from(setup: Setup) -> None:
  """Checks that the weights of `config.init_from` fit, before a run starts.

  Raises:
    UserError: the folder holds no weights, those of another model, or those
      of another vocabulary.
  """
  path = setup.experiment.config.init_from
  words = pathlib.Path(path) / VOCABULARY_FOLDER
  with _opened(path) as (checkpoints, step):
    _check_shapes(path, checkpoints.shapes(step)["params"], _variables(setup))
  if words.is_dir():
    theirs = Vocabulary.load(words).fingerprint
    ours = setup.experiment.vocabulary.fingerprint
    if theirs != ours:
      raise UserError(
        f'init_from="{path}" has another vocabulary ({theirs[:12]}, this run'
        f" {ours[:12]}), so its embeddings mean other words; set"
        " --config.vocabulary.source and .path to the files it was made from"
      )


def init_from(setup: Setup, state: TrainState) -> TrainState:
  """Puts the weights of `config.init_from` into a fresh state.

  Args:
    setup: of the run.
    state: before the first update; its optimizer state stays.

  Returns:
    The state with these parameters and running statistics, and with moving
    averages that start from them. Where that run had moving averages, those
    are taken.

  Raises:
    UserError: see `check_init_from`.
  """
  path = setup.experiment.config.init_from
  abstract = _variables(setup)
  shardings = {
    "params": setup.shardings.params,
    "batch_stats": setup.shardings.batch_stats,
  }
  target = restore_target(abstract, shardings)
  with _opened(path) as (checkpoints, step):
    stored = checkpoints.shapes(step)
    _check_shapes(path, stored["params"], abstract)
    ema = stored.get("ema")
    if ema is not None:
      wanted = flatten(target)
      # Parameters that were frozen there have no average.
      ema = {name: wanted[name] for name in flatten(ema)}
      ema = flax.traverse_util.unflatten_dict(ema, sep="/")
      ema = {"batch_stats": {}, **ema}
    read = checkpoints.restore_variables(step, target, ema)
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


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Checkpoints, int]]:
  """Opens the checkpoints of a folder; yields them and the best step."""
  place = pathlib.Path(path)
  if place.is_file():
    raise UserError(
      f'init_from="{path}" is a file; convert it first: python -m'
      f" narvl_jax.convert --from={path} --to=FOLDER, then"
      " --config.init_from=FOLDER"
    )
  if not place.exists():
    raise UserError(
      f'init_from="{path}": there is no such folder (--config.init_from)'
    )
  if not (place / FOLDER).is_dir():
    raise UserError(
      f'init_from="{path}" holds no {FOLDER}; it must be the folder of a run'
      " or of converted weights (--config.init_from)"
    )
  with Checkpoints(path) as checkpoints:
    try:
      step = choose_step(checkpoints, "best")
    except UserError as error:
      raise UserError(
        f'init_from="{path}" has no checkpoint yet (--config.init_from)'
      ) from error
    yield checkpoints, step


def _check_shapes(
  path: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises UserError unless two trees have the same leaves and shapes."""
  theirs = {name: tuple(x.shape) for name, x in flatten(stored).items()}
  ours = {name: tuple(x.shape) for name, x in flatten(wanted).items()}
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


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
  if name not in shapes:
    return "nothing"
  return "x".join(map(str, shapes[name])) or "a number"
