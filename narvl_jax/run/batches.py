"""Batches are copied to the devices before they are needed."""

import functools
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh

from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.data.batches.pipeline import (
  BadRecords,
  TrainBatches,
  train_batches,
)
from narvl_jax.parallel import shard_batch
from narvl_jax.training.setup import Setup

_END = object()


class DevicePrefetcher:
  """Reads host batches in a thread and places them on the mesh."""

  def __init__(
    self,
    batches: Iterator[Mapping[str, np.ndarray]],
    mesh: Mesh,
    names: tuple[str, ...],
    depth: int = 2,
    batch_size: int | None = None,
  ) -> None:
    """Starts the thread.

    Args:
      batches: host batches, arrays [R, ...] of the rows of this host.
      names: the arrays to copy.
      depth: number of batches that wait on the devices.
      batch_size: batch size of all hosts together; None for that of `batches`.
    """
    self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
    self._stop = threading.Event()
    self._thread = threading.Thread(
      target=self._fill, args=(batches, mesh, names, batch_size), daemon=True
    )
    self._thread.start()

  @property
  def ready(self) -> bool:
    """Whether `get` returns at once."""
    return not self._queue.empty()

  def get(self) -> dict[str, jax.Array]:
    """Waits for the next batch and returns it.

    Raises:
      StopIteration: there are no more batches.
      Exception: an error of the iterator.
    """
    item = self._queue.get()
    if item is _END:
      raise StopIteration
    if isinstance(item, BaseException):
      raise item
    return item

  def close(self) -> None:
    """Ends the thread."""
    self._stop.set()
    while not self._queue.empty():
      self._queue.get_nowait()
    self._thread.join(timeout=10)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _fill(
    self,
    batches: Iterator[Mapping[str, np.ndarray]],
    mesh: Mesh,
    names: tuple[str, ...],
    batch_size: int | None,
  ) -> None:
    # These belong to the main thread. Worker processes inherit the mask;
    # otherwise a signal would end them during their imports.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
    try:
      for batch in batches:
        chosen = {name: batch[name] for name in names}
        self._put(shard_batch(chosen, mesh, batch_size))
        if self._stop.is_set():
          return
      self._put(_END)
    except Exception as error:
      self._put(error)

  def _put(self, item: Any) -> None:
    while not self._stop.is_set():
      try:
        self._queue.put(item, timeout=0.2)
      except queue.Full:
        continue
      return


class DeviceBatches:
  """The training batches of a run on its devices, from any position.

  Attributes:
    position: position of the next batch: the number of batches before it.
  """

  def __init__(
    self,
    open_batches: Callable[[int], TrainBatches],
    position: int,
    mesh: Mesh,
    names: tuple[str, ...],
    batch_size: int,
  ) -> None:
    self._open_batches = open_batches
    self._mesh = mesh
    self._names = names
    self._batch_size = batch_size
    self._open(position)

  def seek(self, position: int) -> None:
    """Continues with the batch at another position."""
    self.close()
    self._open(position)

  def _open(self, position: int) -> None:
    self.position = position
    self._source = self._open_batches(position)
    self._prefetcher = DevicePrefetcher(
      self._source, self._mesh, self._names, batch_size=self._batch_size
    )

  @property
  def ready(self) -> bool:
    """Whether `get` returns at once."""
    return self._prefetcher.ready

  def get(self) -> dict[str, jax.Array]:
    """Returns the next batch, as `DevicePrefetcher.get` does."""
    batch = self._prefetcher.get()
    self.position += 1
    return batch

  def counters(self, position: int) -> dict[str, float]:
    """See `TrainBatches.counters`."""
    return self._source.counters(position)

  def examples(self, position: int) -> list[tuple[str, int]]:
    """See `TrainBatches.examples`."""
    return self._source.examples(position)

  def close(self) -> None:
    """Ends the threads and processes."""
    self._prefetcher.close()
    self._source.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def batch_opener(
  setup: Setup, mixture: Mixture
) -> Callable[[int], TrainBatches]:
  """Returns the function position -> batches of this host from there on."""
  experiment = setup.experiment
  config = experiment.config
  return functools.partial(
    train_batches,
    mixture,
    experiment.tasks,
    batcher=experiment.batcher,
    num_workers=config.data.num_workers,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
    # Shared, so that the count continues after `seek`.
    bad_records=BadRecords(config.data.max_bad_fraction),
  )
