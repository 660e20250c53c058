"""Weights of another run, or converted ones, as the start of a new run.

Every parameter is copied from the stored one of the same name, after the
renames of `config.init_renames`. Parameters in `config.init_drops` keep their
initial values. `sizes` resolves some differences in shape; all others are
errors. A parallel model and its autoregressive twin differ only in the queries
and the row of the blank, so each can start from the other.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from flax.linen import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from narvl_jax.checkpointing.record import describe_shape
from narvl_jax.checkpointing.weights import opened, read_weights
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError, list_few
from narvl_jax.parallel import fitting_sharding
from narvl_jax.state import renames as init_names
from narvl_jax.state.parameters import flatten, split_frozen
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup
from narvl_jax.warm_start.sizes import (
  QUERIES,
  Fit,
  Origin,
  Shape,
  find_fit,
  read_origin,
)

# Parameters that an error names.
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sources of the parameters of a run.

  Attributes:
    stored: shape of every stored array.
    sources: our array -> stored array; missing ones keep their initial values.
    fits: our array -> how it is made from a stored one of another shape.
    notes: sentences about everything that is not copied unchanged.
  """

  stored: dict[str, Shape]
  sources: dict[str, str]
  fits: dict[str, Fit]
  notes: list[str]


def plan_weights(setup: Setup) -> Plan:
  """Plans how the weights of `config.init_from` fit; reads only shapes.

  Raises:
    UserError: the folder has no weights or those of another model, or a rule
      of `init_renames` or `init_drops` has no effect.
  """
  with opened(setup.experiment.config.init_from, "init_from") as (
    checkpoints,
    step,
  ):
    return _plan(setup, checkpoints, step)


def init_from(setup: Setup, state: TrainState, plan: Plan) -> TrainState:
  """Replaces the variables of a fresh state by those of `config.init_from`.

  The moving averages of the other run are used if it has them. Those of this
  run start from the new parameters.

  Raises:
    UserError: see `plan_weights`.
  """
  fresh = flatten({"params": state.params, "batch_stats": state.batch_stats})
  with opened(setup.experiment.config.init_from, "init_from") as (
    checkpoints,
    step,
  ):
    tree = flax.traverse_util.unflatten_dict(_targets(setup, plan), sep="/")
    read = flatten(read_weights(checkpoints, step, {"batch_stats": {}, **tree}))
  taken = {name: read[source] for name, source in plan.sources.items()}
  taken |= _fitted(plan.fits, fresh, taken)
  joined = {name: taken.get(name, leaf) for name, leaf in fresh.items()}
  new = flax.traverse_util.unflatten_dict(joined, sep="/")
  new = {"batch_stats": {}, **new}
  averages = None
  if state.ema is not None:
    trained, _ = split_frozen(new["params"], setup.rules)
    # Copies: two leaves in one buffer could not both be donated.
    averages = jax.tree.map(
      jnp.copy, {"params": trained, "batch_stats": new["batch_stats"]}
    )
  return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
    params=new["params"], batch_stats=new["batch_stats"], ema=averages
  )


def _targets(setup: Setup, plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape, dtype and sharding to read every stored array with.

  Each has the sharding of our array as far as it divides the stored shape.
  Dropped arrays, which are read too, are spread over all devices.
  """
  wanted = flatten(_variables(setup.abstract_state))
  shardings = flatten(_variables(setup.shardings))
  ours = {source: name for name, source in plan.sources.items()}
  targets = {}
  for source, shape in plan.stored.items():
    name = ours.get(source)
    if name is None:
      dtype, sharding = jnp.float32, _spread(setup.mesh, shape)
    else:
      dtype, sharding = wanted[name].dtype, shardings[name]
    sharding = fitting_sharding(sharding, shape)
    targets[source] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return targets


def _spread(mesh: Mesh, shape: Shape) -> NamedSharding:
  """Returns a sharding of the largest dimension over all devices."""
  largest = max(range(len(shape)), key=shape.__getitem__, default=0)
  return NamedSharding(
    mesh, PartitionSpec(*[None] * largest, tuple(mesh.axis_names))
  )


def _fitted(
  fits: Mapping[str, Fit],
  fresh: Mapping[str, jax.Array],
  taken: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """Resizes arrays, with the shardings of ours."""
  if not fits:
    return {}

  def join(
    fresh: dict[str, jax.Array], taken: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    return {
      name: fit.join(fresh[name], taken[name]) for name, fit in fits.items()
    }

  before = {name: fresh[name] for name in fits}
  shardings = {name: leaf.sharding for name, leaf in before.items()}
  return jax.jit(join, out_shardings=shardings)(
    before, {name: taken[name] for name in fits}
  )


def _variables(state: TrainState) -> dict[str, Any]:
  return meta.unbox({"params": state.params, "batch_stats": state.batch_stats})


def _shapes(tree: Mapping[str, Any]) -> dict[str, Shape]:
  return {name: tuple(x.shape) for name, x in flatten(tree).items()}


def _plan(setup: Setup, checkpoints: Checkpoints, step: int) -> Plan:
  """Finds a source for every array; see `plan_weights`."""
  experiment = setup.experiment
  config = experiment.config
  stored = _shapes(checkpoints.shapes(step)["params"])
  ours = _shapes(_variables(setup.abstract_state))
  sources = init_names.rename(
    list(stored), init_names.parse_renames(config.init_renames)
  )
  origin = read_origin(config.init_from, parallel=QUERIES in sources)
  drops = init_names.parse_drops(config.init_drops)
  dropped = init_names.dropped({*sources, *ours}, drops)
  notes = []
  if dropped & ours.keys():
    names = [_name(name) for name in sorted(dropped & ours.keys())]
    notes.append(f"{list_few(names, _SHOWN)} stay fresh (init_drops)")
  if origin.parallel == experiment.autoregressive:
    dropped |= {QUERIES}
    notes.append(
      "it is a parallel model, whose queries are left out"
      if origin.parallel
      else "it is an autoregressive model: decoder/query_embed stays fresh"
    )
  sources = {x: y for x, y in sources.items() if x not in dropped}
  fits = {}
  for name in sorted(sources.keys() & ours.keys()):
    fit = find_fit(experiment, origin, name, stored[sources[name]], ours[name])
    if fit is not None:
      fits[name] = fit
      notes.append(fit.note)
  _check_shapes(
    origin,
    {
      name: ours[name] if name in fits else stored[source]
      for name, source in sources.items()
    },
    {name: shape for name, shape in ours.items() if name not in dropped},
  )
  notes += _frozen_notes(setup, ours.keys() - sources.keys())
  return Plan(
    stored=stored,
    sources=sources,
    fits=fits,
    notes=[f"{origin.named}: {note}" for note in notes],
  )


def _frozen_notes(setup: Setup, fresh: Iterable[str]) -> list[str]:
  """Warns of parameters that are neither copied nor trained."""
  names = sorted(
    name
    for collection, name in map(init_names.split, fresh)
    if collection == "params" and setup.rules[name].freeze
  )
  if not names:
    return []
  return [
    f"{list_few(names, _SHOWN)} start fresh but are frozen, so they stay random"
    " (--config.optimizer.rules)"
  ]


def _check_shapes(
  origin: Origin, theirs: Mapping[str, Shape], ours: Mapping[str, Shape]
) -> None:
  """Raises UserError unless two trees have the same leaves and shapes."""
  different = sorted(
    name
    for name in theirs.keys() | ours.keys()
    if theirs.get(name) != ours.get(name)
  )
  if not different:
    return
  only = {
    "there": [name for name in different if name not in ours],
    "here": [name for name in different if name not in theirs],
  }
  parts = []
  for name in different:
    if name not in theirs or name not in ours:
      here, there = ("here", "there") if name in ours else ("there", "here")
      parts.append(f"{_name(name)} is {here} only{_nearest(name, only, there)}")
    else:
      parts.append(
        f"{_name(name)} has {describe_shape(theirs[name])} there and"
        f" {describe_shape(ours[name])} here"
      )
  names = [_name(name) for name in different[:_SHOWN]]
  drops = "".join(f'"{name}", ' for name in names).rstrip()
  more = " and so on" if len(different) > _SHOWN else ""
  raise UserError(
    f"{origin.named} is of another model: {list_few(parts, _SHOWN)};"
    f" set config.model as in {origin.path}/config.json, rename parameters by"
    ' --config.init_renames=\'(("OLD", "NEW"),)\', or leave them fresh by'
    f" --config.init_drops='({drops})'{more}"
  )


def _nearest(name: str, only: Mapping[str, list[str]], where: str) -> str:
  near = difflib.get_close_matches(name, only[where], n=1)
  return f' (nearest {where}: "{_name(near[0])}")' if near else ""


def _name(whole: str) -> str:
  return init_names.split(whole)[1]
