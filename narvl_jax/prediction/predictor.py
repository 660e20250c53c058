"""Predicts answers of a trained model to one request or to a data set."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from narvl_jax.data.batches import pipeline
from narvl_jax.data.example import Box, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.tasks import Task
from narvl_jax.decoding import Decoding, Steps, make_steps, prepare_variables
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.metrics.calibration import apply_temperature
from narvl_jax.parallel import (
  activation_rules,
  batch_sharding,
  data_parallel_size,
  local_rows,
  local_values,
  shard_batch,
)
from narvl_jax.prediction.box_confidence import probability_of_overlap
from narvl_jax.prediction.readers import answer_lengths, make_reader

_BATCH_KEYS = ("image", "text", "image_mask")
_TARGET_KEYS = ("labels", "label_length")
# Fetched from the devices.
_RESULT_KEYS = ("ids", "lengths", "log_probs")
# All but the first are of parallel models.
_DETAIL_KEYS = (
  *("target_log_prob", "query_entropy"),
  *("coordinate_bins", "coordinate_probs"),
)
# Stands for the infinite loss of an answer that the model cannot give.
_IMPOSSIBLE = 1e9
_GREEDY = Decoding()


class Answer(NamedTuple):
  """The prediction for one request.

  Attributes:
    record: the request.
    index: index of the record in its source.
    value: text, or a box in pixels of the original image.
    log_prob: natural logarithm of its probability, for parallel models over
      all alignments; see the readers in `narvl_jax.decoding`.
    alternatives: the next best answers with their log-probabilities, if
      `num_best` exceeds 1.
    query_entropy: entropy of the distribution of each query in nats, [N];
      () for autoregressive models.
    probability_iou50: probability that the box has an intersection over union
      of at least 0.5 with the true one; see `box_confidence`. None for other
      tasks and for autoregressive models.
    temperature: see `calibrate`; None without calibration.
    loss: negative log-probability of the true answer, 1e9 if it is impossible;
      None without a known truth that fits `data.max_label_length`.
  """

  record: Record
  index: int
  value: str | Box
  log_prob: float
  alternatives: tuple[tuple[str | Box, float], ...] = ()
  query_entropy: tuple[float, ...] = ()
  probability_iou50: float | None = None
  temperature: float | None = None
  loss: float | None = None

  @property
  def raw_probability(self) -> float:
    """Probability of exactly this answer, not calibrated."""
    return math.exp(self.log_prob)

  @property
  def probability(self) -> float:
    """Calibrated confidence; without calibration `raw_probability`."""
    if self.temperature is None:
      return self.raw_probability
    return self.confidence

  @property
  def confidence(self) -> float:
    """Probability that the answer is right, calibrated if possible.

    A box is right if it overlaps the true one by 0.5.
    """
    right = self.probability_iou50
    if right is None:
      right = self.raw_probability
    if self.temperature is None:
      return right
    return float(apply_temperature(right, self.temperature))


class Predictor:
  """A model with its weights.

  Predictors of equal models share one compiled step per batch shape. Batches
  are split over the mesh of the weights, if any. If it spans several hosts, all
  hosts must make the same calls, and each receives a part of the answers.
  """

  def __init__(
    self,
    experiment: Experiment,
    variables: Any,
    decodings: Mapping[str, Decoding] | None = None,
    temperatures: Mapping[str, float] | None = None,
  ) -> None:
    """Prepares the variables.

    Args:
      experiment: the run.
      variables: variables of `experiment.model`, unboxed.
      decodings: decodings by task; the default is greedy.
      temperatures: temperatures by task, see `calibration`; others are not
        calibrated.

    Raises:
      UserError: a value is not a `Decoding`, or the run has no such task.
    """
    values = decodings.values() if isinstance(decodings, Mapping) else [None]
    if decodings and not all(isinstance(x, Decoding) for x in values):
      raise UserError(
        f"decodings={decodings!r} must have a Decoding for each task, such as"
        ' {"caption": Decoding("beam")}; see decodings_for'
      )
    self._experiment = experiment
    for name in decodings or {}:
      self._task(name)
    self._config: Any = experiment.config
    self._variables = prepare_variables(experiment.model, variables)
    self._mesh = _mesh_of(variables)
    self._decodings = dict(decodings or {})
    self._temperatures = dict(temperatures or {})
    self._rules = activation_rules(self._config.mesh.rules)
    self._shared = self._mesh is not None and jax.process_count() > 1
    # One row of each device: CPUs compute rows one by one as fast as together,
    # and the results then do not depend on the batch. Accelerators would wait.
    on_cpu = jax.default_backend() == "cpu"
    self._rows_at_once = self._whole(1) if on_cpu else 0

  @property
  def variables(self) -> Any:
    """The weights, prepared for the steps."""
    return self._variables

  def steps(self, task_name: str) -> Steps:
    """Returns the compiled programs of a task; tasks may share them.

    Raises:
      UserError: its decoding does not fit the task or the model.
    """
    decoding = self._decodings.get(task_name, _GREEDY)
    reader = make_reader(self._experiment, task_name, decoding)
    return make_steps(
      self._experiment.model, reader, self._rules, self._rows_at_once
    )

  def lengths(self, task_name: str) -> np.ndarray:
    """Returns least and most tokens of an answer, int32 [2]."""
    decoding = self._decodings.get(task_name, _GREEDY)
    return answer_lengths(self._experiment, decoding)

  def answer(self, record: Record) -> Answer:
    """Predicts one request.

    Raises:
      UserError: the run has no such task, the picture is unreadable, or the
        prompt is empty or too long.
    """
    task = self._task(record.task)
    batcher = self._experiment.batcher
    batch = batcher.empty(self._whole(1))
    example = batcher.prepare(record, task, target="optional")
    for row in range(len(batch["index"])):
      batcher.put(batch, row, example)
    size = len(batch["index"])
    decoded = self._start(batch, task, size)
    return next(self._finish(decoded, batch, [record], task))

  def answers(
    self,
    source: Sequence[Record],
    task_name: str,
    *,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
    bad_records: pipeline.BadRecords | None = None,
  ) -> Iterator[Answer]:
    """Predicts every good record of a source, in order.

    Several hosts share the records, because preparing them takes time. Each
    host predicts the rows of its devices; hosts that share rows predict the
    same records.

    Args:
      source: records of the task.
      task_name: one of the experiment's tasks.
      batch_size: rounded up to a multiple of the devices that share a batch.
      before_batch: called before each batch, equally often on all hosts.
      bad_records: counts the bad records of this host.

    Raises:
      UserError: the run has no such task, the source is empty or too many of
        its records are bad.
    """
    data = self._config.data
    task = self._task(task_name)
    size = self._whole(batch_size)
    batches = pipeline.eval_batches(
      source,
      task,
      self._experiment.batcher,
      batch_size=size,
      rows=None if self._mesh is None else local_rows(self._mesh, size),
      num_threads=data.num_threads,
      prefetch=data.prefetch,
      bad_records=bad_records or pipeline.BadRecords(data.max_bad_fraction),
      name=task_name,
    )
    # The device computes one batch while the host decodes the previous one.
    previous = None
    for batch, records in batches:
      before_batch()
      current = self._start(batch, task, size), batch, records
      if previous is not None:
        yield from self._finish(*previous, task)
      previous = current
    if previous is not None:
      yield from self._finish(*previous, task)

  def _task(self, name: str) -> Task[Any]:
    tasks = self._experiment.tasks
    if name not in tasks:
      raise UserError(
        f'the run has no task "{name}".{did_you_mean(name, list(tasks))}'
      )
    return tasks[name]

  def _whole(self, batch_size: int) -> int:
    """Rounds up so that the batch divides over the devices."""
    parts = 1 if self._mesh is None else data_parallel_size(self._mesh)
    return -(-batch_size // parts) * parts

  def _start(
    self, batch: Mapping[str, np.ndarray], task: Task[Any], size: int
  ) -> dict[str, jax.Array]:
    """Starts the computation of a batch; this host has a part of its rows."""
    arrays = {key: batch[key] for key in (*_BATCH_KEYS, *_TARGET_KEYS)}
    arrays["merge_repeats"] = np.full(len(batch["index"]), task.merge_repeats)
    if self._mesh is not None:
      arrays = shard_batch(arrays, self._mesh, size)
    target = tuple(arrays.pop(key) for key in _TARGET_KEYS)
    context = jax.set_mesh(self._mesh) if self._mesh else nullcontext()
    with context:
      decoded = self.steps(task.name).predict(
        self._variables,
        **arrays,
        lengths=self.lengths(task.name),
        target=target,
      )
    keys = *_RESULT_KEYS, *(key for key in _DETAIL_KEYS if key in decoded)
    decoded = {key: decoded[key] for key in keys}
    if self._mesh is None or not self._shared:
      return decoded
    return _splitter(self._mesh)(decoded)

  def _finish(
    self,
    decoded: Mapping[str, jax.Array],
    batch: Mapping[str, np.ndarray],
    records: Sequence[Record],
    task: Task[Any],
  ) -> Iterator[Answer]:
    """Waits for a batch and converts its ids to answers."""
    host = self._fetch(decoded)
    for row, record in enumerate(records):
      size = images.original_size(record.image)
      ranked = [
        (task.decode(ids[:length].tolist(), size), float(log_prob))
        for ids, length, log_prob in zip(
          *(host[key][row] for key in _RESULT_KEYS), strict=True
        )
      ]
      details = {key: host[key][row] for key in _DETAIL_KEYS if key in host}
      yield Answer(
        record,
        int(batch["index"][row]),
        *ranked[0],
        tuple(ranked[1:]),
        tuple(map(float, details.get("query_entropy", ()))),
        self._overlap(task, host["ids"][row, 0], details),
        self._temperatures.get(task.name),
        _loss(details, int(batch["label_length"][row])),
      )

  def _overlap(
    self, task: Task[Any], ids: np.ndarray, details: Mapping[str, np.ndarray]
  ) -> float | None:
    """Returns `probability_iou50` of an answer; 0 without a complete box."""
    if task.name != "grounding" or "coordinate_bins" not in details:
      return None
    vocabulary = self._experiment.vocabulary
    bins = ids - vocabulary.bin_start
    box = bins[(bins >= 0) & (bins < vocabulary.num_bins)]
    if len(box) != 4:
      return 0.0
    return probability_of_overlap(
      details["coordinate_bins"], details["coordinate_probs"], box
    )

  def _fetch(self, decoded: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Fetches the rows of this host."""
    if not self._shared:
      return jax.device_get(dict(decoded))
    assert self._mesh is not None
    rows = local_rows(self._mesh, len(decoded["ids"]))
    return {key: local_values(x, rows) for key, x in decoded.items()}


def _loss(details: Mapping[str, np.ndarray], labels: int) -> float | None:
  """Returns the loss of a target of so many labels; 0 is no target."""
  if not labels or "target_log_prob" not in details:
    return None
  return min(-float(details["target_log_prob"]), _IMPOSSIBLE)


@functools.lru_cache(maxsize=4)
def _splitter(mesh: Mesh) -> Any:
  """Returns a function that splits results over the hosts as the batch is."""
  return jax.jit(lambda arrays: arrays, out_shardings=batch_sharding(mesh))


def _mesh_of(variables: Any) -> Mesh | None:
  """Returns the mesh of the variables if it has several devices."""
  for leaf in jax.tree.leaves(variables):
    placement = getattr(leaf, "sharding", None)
    if isinstance(placement, NamedSharding) and placement.mesh.size > 1:
      assert isinstance(placement.mesh, Mesh)
      return placement.mesh
  return None
