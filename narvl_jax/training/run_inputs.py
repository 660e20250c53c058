"""What users vary from run to run without compiling the update again."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from narvl_jax.parallel import replicated
from narvl_jax.training.teacher import Teacher


class RunInputs(NamedTuple):
  """Inputs of the update that are constant during a run.

  As constants of the program, another value would compile it again.

  Attributes:
    seed: data of the key of dropout, uint32 (`jax.random.key_data`).
    learning_rate: peak of the schedule, float32 scalar.
    teacher: variables of the teacher; None without one.
  """

  seed: Any
  learning_rate: Any
  teacher: Any = None


def input_shapes(teacher: Teacher | None) -> RunInputs:
  """Returns the shapes of the inputs."""
  return RunInputs(
    jax.eval_shape(_seed_data, 0),
    jax.ShapeDtypeStruct((), np.float32),
    teacher and teacher.shapes,
  )


def input_shardings(teacher: Teacher | None, mesh: Mesh) -> RunInputs:
  """Returns the shardings of the inputs."""
  return RunInputs(
    replicated(mesh), replicated(mesh), teacher and teacher.shardings
  )


def read_inputs(config: Any, teacher: Teacher | None, mesh: Mesh) -> RunInputs:
  """Returns the inputs of a config, on the mesh; reads a teacher's weights."""

  def place(value: Any) -> jax.Array:
    value, sharding = np.asarray(value), replicated(mesh)
    return jax.make_array_from_callback(value.shape, sharding, lambda _: value)

  return RunInputs(
    place(_seed_data(config.seed)),
    place(np.float32(config.optimizer.learning_rate)),
    teacher and teacher.read(),
  )


def _seed_data(seed: Any) -> jax.Array:
  return jax.random.key_data(jax.random.key(seed))
