"""Answers requests with a trained model, one at a time or by the batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from narvl_jax.data import images, pipeline
from narvl_jax.data.example import Box, Record
from narvl_jax.decoding import make_predict_step
from narvl_jax.parallel import batch_sharding, data_parallel_size

if TYPE_CHECKING:
  from narvl_jax.data.tasks import Task
  from narvl_jax.experiment import Experiment

_BATCH_KEYS = ("image", "text", "image_mask")


class Answer(NamedTuple):
  """What the model says to one request.

  Attributes:
    record: the request.
    index: position of the record in its source.
    value: text, or a box in pixels of the original image.
    probability: see `narvl_jax.decoding.greedy_decode`.
  """

  record: Record
  index: int
  value: str | Box
  probability: float


class Predictor:
  """A model with its weights, ready to answer.

  All predictors of equal models share one compiled step per batch shape. The
  batch is split over the mesh on which the weights lie, if any.
  """

  def __init__(self, experiment: "Experiment", variables: Any) -> None:
    """Takes the variables of `experiment.model`, unboxed."""
    self._experiment = experiment
    self._config: Any = experiment.config
    self._variables = variables
    self._mesh = _mesh_of(variables)
    vocabulary = experiment.vocabulary
    mask_specials = self._config.evaluation.mask_specials
    self._step = make_predict_step(
      experiment.model,
      blank_id=vocabulary.blank_id,
      pad_id=vocabulary.pad_id,
      forbidden=vocabulary.forbidden if mask_specials else None,
    )

  def answer(self, record: Record) -> Answer:
    """Answers one request.

    Raises:
      UserError: the picture is unreadable, or the prompt empty or too long.
    """
    task = self._experiment.tasks[record.task]
    batcher = pipeline.Batcher(**self._shapes())
    batch = batcher.empty(self._whole(1))
    for row in range(len(batch["index"])):
      batcher.write(batch, row, record, task, target="none")
    return next(self._finish(self._start(batch, task), batch, [record], task))

  def answers(
    self, source: Sequence[Record], task_name: str, *, batch_size: int
  ) -> Iterator[Answer]:
    """Answers every good record of a source, in order.

    Args:
      source: records of the task.
      task_name: one of the experiment's tasks.
      batch_size: rounded up to a multiple of the devices that share a batch.

    Raises:
      UserError: the source is empty or too many of its records are bad.
    """
    data = self._config.data
    task = self._experiment.tasks[task_name]
    batches = pipeline.eval_batches(
      source,
      task,
      batch_size=self._whole(batch_size),
      num_threads=data.num_threads,
      prefetch=data.prefetch,
      bad_records=pipeline.BadRecords(data.max_bad_fraction),
      name=task_name,
      **self._shapes(),
    )
    # The device computes one batch while the host reads the one before it.
    previous = None
    for batch, records in batches:
      current = self._start(batch, task), batch, records
      if previous is not None:
        yield from self._finish(*previous, task)
      previous = current
    if previous is not None:
      yield from self._finish(*previous, task)

  def _shapes(self) -> dict[str, Any]:
    data = self._config.data
    return {
      "image_size": tuple(data.image_size),
      "max_text_length": data.max_text_length,
      "max_label_length": data.max_label_length,
    }

  def _whole(self, batch_size: int) -> int:
    """Rounds up to what divides over the devices."""
    parts = 1 if self._mesh is None else data_parallel_size(self._mesh)
    return -(-batch_size // parts) * parts

  def _start(
    self, batch: Mapping[str, np.ndarray], task: "Task[Any]"
  ) -> dict[str, jax.Array]:
    """Hands a batch to the device and does not wait."""
    arrays = {key: batch[key] for key in _BATCH_KEYS}
    arrays["merge_repeats"] = np.full(len(batch["index"]), task.merge_repeats)
    if self._mesh is not None:
      arrays = jax.device_put(arrays, batch_sharding(self._mesh))
    return self._step(self._variables, **arrays)

  def _finish(
    self,
    decoded: Mapping[str, jax.Array],
    batch: Mapping[str, np.ndarray],
    records: Sequence[Record],
    task: "Task[Any]",
  ) -> Iterator[Answer]:
    """Waits for a batch and turns its ids into answers."""
    host = jax.device_get(dict(decoded))
    for row, record in enumerate(records):
      ids = host["ids"][row, : host["lengths"][row]].tolist()
      value = task.decode(ids, images.original_size(record.image))
      probability = float(host["probability"][row])
      yield Answer(record, int(batch["index"][row]), value, probability)


def _mesh_of(variables: Any) -> Mesh | None:
  """Returns the mesh on which the variables lie, if it has many devices."""
  for leaf in jax.tree.leaves(variables):
    placement = getattr(leaf, "sharding", None)
    if isinstance(placement, NamedSharding) and placement.mesh.size > 1:
      assert isinstance(placement.mesh, Mesh)
      return placement.mesh
  return None
