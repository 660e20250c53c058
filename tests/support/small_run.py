"""Complete runs with all features of training, compiled once.

Accumulation, moving averages, dropout, BatchNorm with statistics of the batch,
and a mixture of three sources; checkpoints on disk. Only what
`narvl_jax.train.train` does around `_fit` is omitted. The model is the
stand-in or the real one, which Orbax takes a second to save or restore.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from narvl_jax.checkpointing.writing import Checkpoints, restore_target
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.experiment.config import Config, train_source
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import load_mixture
from narvl_jax.parallel import make_mesh, shard_batch
from narvl_jax.reliability.guard import Guard
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import training_run
from narvl_jax.run.announce import Announcer
from narvl_jax.run.batches import batch_opener
from narvl_jax.run.data_checks import make_mixture
from narvl_jax.run.run import Run
from narvl_jax.run.start import restore_or_init
from narvl_jax.run_folder.metrics import MetricsWriter
from narvl_jax.state.train_state import TrainState
from narvl_jax.training.setup import Setup, build_setup
from tests.support.stand_in import StandIn
from tests.support.tiny import tiny_config

STEPS = 10


def config() -> Config:
  """Returns the config; tests change only settings that are not compiled."""
  config = tiny_config()
  # Otherwise Adam amplifies differences between gradients near zero.
  config.optimizer.eps = 1e-3
  config.data.train = {
    "questions": train_source("shapes", "vqa", image_size=48, weight=2.0),
    "boxes": train_source(
      "shapes", "grounding", image_size=48, weight=((0, 1.0), (4, 3.0))
    ),
    "others": train_source("shapes", "vqa", image_size=48, split="validation"),
  }
  config.model.update(
    {
      "image_encoder": "resnet",
      "resnet_blocks": (1, 1, 1),
      "resnet_width": 4,
      "batch_norm": "batch",
      "dropout": 0.1,
    }
  )
  config.train.update(
    {
      "steps": STEPS,
      "accumulation_steps": 2,
      "log_every": 1,
      "eval_every": 0,
      "checkpoint_every": 1,
      "keep_last": STEPS,
    }
  )
  return config


@functools.cache
def setup(real: bool = False, devices: int = 2) -> Setup:
  """Returns the run of a model on some devices."""
  settings = config()
  if not real:
    # The stand-in's parameters have no axis names.
    settings.mesh.rules = ()
  experiment = create(settings)
  if not real:
    size = experiment.vocabulary.size
    model: Any = StandIn(
      dropout=0.1, batch_norm=True, vocab_size=size, num_queries=6
    )
    experiment = dataclasses.replace(experiment, model=model)
  return build_setup(experiment, make_mesh(devices))


@functools.cache
def mixture() -> Mixture:
  """Returns the mixture of the run."""
  return make_mixture(config(), load_mixture(config()))


@functools.cache
def compiled(real: bool = False, devices: int = 2) -> jax.stages.Compiled:
  """Returns the update."""
  run = setup(real, devices)
  return run.compile_step()


class CachedSetup(Setup):
  """Compiles once."""

  def compile_step(self) -> jax.stages.Compiled:
    real = not isinstance(self.experiment.model, StandIn)
    return compiled(real, self.mesh.size)


def with_config(real: bool, devices: int, **settings: Any) -> Setup:
  """Returns the run with other settings; double underscores mean dots."""
  run = setup(real, devices)
  changed = config()
  changed.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in settings.items()}
  )
  experiment = dataclasses.replace(run.experiment, config=changed)
  fields = {
    field.name: getattr(run, field.name) for field in dataclasses.fields(run)
  }
  return CachedSetup(**{**fields, "experiment": experiment})


def train(
  workdir: pathlib.Path,
  *,
  real: bool = False,
  devices: int = 2,
  **settings: Any,
) -> TrainState:
  """Trains in a folder to the last step, resuming from its checkpoint.

  Args:
    workdir: run folder.
    real: the real model instead of the stand-in.
    devices: number of devices.
    **settings: see `with_config`.

  Returns:
    The last state, on the host.
  """
  run = with_config(real, devices, **settings)
  workdir.mkdir(parents=True, exist_ok=True)
  guard = Guard(workdir, Ledger())
  say = Announcer(guard.ledger)
  keep = run.experiment.config.train.keep_last
  with jax.set_mesh(run.mesh), Checkpoints(workdir, keep_last=keep) as saved:
    state, step, stored = restore_or_init(run, saved, say)
    with MetricsWriter(workdir, step) as writer:
      opened = Run(run, mixture(), saved, writer, guard, say)
      state = training_run._train(opened, state, stored)
  return jax.device_get(state)


@functools.cache
def host_batches(count: int) -> list[dict[str, np.ndarray]]:
  """Returns the first batches of the run."""
  source = batch_opener(setup(), mixture())(0)
  found = list(itertools.islice(source, count))
  source.close()
  return found


def by_hand(
  positions: Sequence[int | None], real: bool = False
) -> list[TrainState]:
  """Returns the states, on the host, before and after one update for each.

  Args:
    positions: indices of the batches; None is an update without effect.
    real: the real model instead of the stand-in.
  """
  run = setup(real)
  state = run.init(jax.random.key(run.experiment.config.seed))
  states = [jax.device_get(state)]
  inputs = run.read_inputs()
  for position in positions:
    if position is None:
      state = passed_over(state)
    else:
      batch = host_batches(STEPS + 4)[position]
      chosen = {name: batch[name] for name in run.batch}
      state, _ = compiled(real)(inputs, state, shard_batch(chosen, run.mesh))
    states.append(jax.device_get(state))
  return states


def passed_over(state: TrainState) -> TrainState:
  """Returns a state in which only the step is advanced."""
  *others, schedule = state.opt_state
  schedule = schedule._replace(count=schedule.count + 1)
  return dataclasses.replace(
    state, step=state.step + 1, opt_state=(*others, schedule)
  )


def states_on_disk(workdir: pathlib.Path) -> dict[int, TrainState]:
  """Returns the contents of all checkpoints of a folder, by step."""
  run = setup()
  target = restore_target(run.abstract_state, run.shardings)
  with Checkpoints(workdir) as saved:
    return {
      step: jax.device_get(saved.restore(step, target))
      for step in saved.steps()
    }


def assert_equal(a: TrainState, b: TrainState) -> None:
  """Compares all leaves bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  others = jax.tree.leaves(b)
  for (path, leaf), other in zip(
    jax.tree.leaves_with_path(a), others, strict=True
  ):
    np.testing.assert_array_equal(leaf, other, err_msg=str(path))


def depends_on_clock(metric: str) -> bool:
  """Returns whether a value of `metrics.jsonl` differs in equal runs."""
  return (
    "examples_per_second" in metric
    or metric in ("time", "train/data_wait", "train/seconds_left")
    or metric.startswith("goodput/")
  )
