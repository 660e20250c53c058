"""Worker processes that prepare batches, on grain's `mp_prefetch`."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import grain

from narvl_jax.data.batches.processes import exit_with_parent
from narvl_jax.data.batches.shared_batches import (
  Layout,
  Segments,
  WorkerSegments,
)
from narvl_jax.errors import UserError

_MIN_SHARED_BYTES = 512
_TRACKER_WARNING = "ignore:resource_tracker:UserWarning"
# Segments of this process if it is a worker.
_segments: WorkerSegments | None = None


def in_processes(
  dataset: Any, num_workers: int, buffered: int, segments: Segments
) -> Any:
  """Returns the same elements in the same order, made by worker processes.

  Args:
    dataset: a grain IterDataset that can be pickled.
    buffered: elements that each process prepares ahead; at least 1.
    segments: shared memory, which the workers find with `own_segments`.
  """
  options = grain.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=max(buffered, 1)
  )
  # Keeps messages smaller than the buffer of a pipe.
  dataset = grain.experimental.WithOptionsIterDataset(
    dataset, grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
  )
  start = functools.partial(
    _start_worker, segments.names, segments.layout, os.getpid()
  )
  return dataset.mp_prefetch(options, worker_init_fn=start)


def quiet_cleanup() -> None:
  """Silences the clean-up of multiprocessing after an abrupt end.

  Its resource tracker, a process of its own, removes the shared memory and
  semaphores of a run that ends within a step. It would warn about them on the
  terminal, after the line that names the command to resume. To be called
  before the tracker starts.
  """
  if _TRACKER_WARNING not in sys.warnoptions:
    # Passed to every Python process that multiprocessing starts.
    sys.warnoptions.append(_TRACKER_WARNING)


def own_segments() -> WorkerSegments | None:
  """Returns the segments of this process; None if it is not a worker."""
  return _segments


@contextlib.contextmanager
def failures_explained() -> Iterator[None]:
  """Replaces grain's RuntimeError about a dead worker by one line.

  Raises:
    UserError: a worker process ended unexpectedly.
  """
  try:
    yield
  except RuntimeError as error:
    if "Worker process was terminated" not in str(error):
      raise
    raise UserError(
      f"a process that prepares data died ({str(error).split('. ')[0]}); out"
      " of memory? Lower --config.data.num_workers or --config.data.prefetch"
    ) from error


def _start_worker(
  names: list[list[str]], layout: Layout, parent: int, index: int, count: int
) -> None:
  """Opens the segments, ignores signals, and ends after its parent."""
  del count
  global _segments
  _segments = WorkerSegments(names[index], layout)
  # Ctrl-C and schedulers signal the whole process group, yet the main process
  # still needs the batches of the step at which it saves and stops.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  exit_with_parent(parent)
