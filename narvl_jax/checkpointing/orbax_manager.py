"""Orbax's manager of checkpoints, set up for how runs use it."""

import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import flags
from absl import logging as absl_logging
from orbax.checkpoint import multihost as _defines_the_flag
from orbax.checkpoint import type_handlers

from narvl_jax.checkpointing import record as record_lib
from narvl_jax.checkpointing.retention import Policy

del _defines_the_flag

# Checkpoints that are no longer kept go here by a rename, so that a process
# that is killed while it deletes leaves no half of one behind.
DELETED = ".deleted"
# Smallest part of a replicated array that a device writes.
_MIN_SLICE_BYTES = 4 << 20
# In which all hosts must have written their parts of a checkpoint.
_SAVE_SECONDS = 1200


def open_manager(
  folder: pathlib.Path,
  policy: Policy | None = None,
  note_error: Callable[[BaseException], None] = lambda error: None,
) -> ocp.CheckpointManager:
  """Returns the manager of a folder of checkpoints.

  Args:
    folder: made if it is written to.
    policy: which checkpoints stay; None: the folder is only read.
    note_error: called in another thread as soon as a save fails on this host,
      which else waits for the other ones before it says so.
  """
  _split_only_large_arrays()
  _wait_with_timeouts()
  _silence_errors()
  _let_writers_end()
  arrays = functools.partial(_ArrayHandler, note_error)
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=policy,
      # Not `read_only`, about which orbax warns: it writes only in `save`.
      create=policy is not None,
      cleanup_tmp_directories=policy is not None,
      todelete_subdir=DELETED,
      # A damaged checkpoint must not keep the others from being opened.
      lightweight_initialize=True,
      async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS),
    ),
    item_handlers={
      "params": arrays(),
      "optimizer": arrays(),
      "ema": arrays(),
      record_lib.ITEM: ocp.JsonCheckpointHandler(filename=record_lib.FILE),
    },
  )


class _Watched:
  """A future whose error is told when it happens."""

  def __init__(
    self, future: Any, note_error: Callable[[BaseException], None]
  ) -> None:
    self._future = future
    self._note_error = note_error

  def result(self, timeout: float | None = None) -> Any:
    try:
      return self._future.result(timeout=timeout)
    except BaseException as error:
      self._note_error(error)
      raise

  def cancel(self) -> Any:
    return self._future.cancel()


class _ArrayHandler(ocp.StandardCheckpointHandler):
  """Writes and reads trees of arrays; tells of errors early."""

  def __init__(self, note_error: Callable[[BaseException], None]) -> None:
    super().__init__()
    self._note_error = note_error

  async def async_save(self, *args: Any, **kwargs: Any) -> Sequence[Any] | None:
    futures = await super().async_save(*args, **kwargs) or []
    return [_Watched(future, self._note_error) for future in futures]

  def finalize(self, *args: Any, **kwargs: Any) -> None:
    try:
      super().finalize(*args, **kwargs)
    except BaseException as error:
      self._note_error(error)
      raise


@ocp.args.register_with_handler(_ArrayHandler, for_save=True)
class SaveArrays(ocp.args.StandardSave):
  """A tree of arrays to write."""


@ocp.args.register_with_handler(_ArrayHandler, for_restore=True)
class RestoreArrays(ocp.args.StandardRestore):
  """A tree of `jax.ShapeDtypeStruct` with shardings to read."""


def _wait_with_timeouts() -> None:
  """Has Orbax wait for other hosts by name and for a limited time.

  It else does so by a collective of all devices, which waits for ever.
  """
  name = "experimental_orbax_use_distributed_barrier"
  flags.FLAGS[name].value = True


@functools.cache
def _split_only_large_arrays() -> None:
  """Has Orbax write a replicated array from one device unless it is large.

  It else splits every array over all replicas, for which it compiles one
  slice for each device and shape: a minute at the first save on a CPU.
  """
  handler = type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
  )
  verbosity = absl_logging.get_verbosity()
  # It warns of what it is asked to do.
  absl_logging.set_verbosity(absl_logging.ERROR)
  type_handlers.register_type_handler(jax.Array, handler, override=True)
  absl_logging.set_verbosity(verbosity)


@functools.cache
def _let_writers_end() -> None:
  """Lets a process end though threads of Orbax still wait to write.

  Where the folder of a checkpoint cannot be made, as on a disk that became
  read-only, they wait for it until the save times out, and Python for them.
  A save that has not failed is waited for by `Checkpoints`.
  """
  module = sys.modules.get("orbax.checkpoint._src.futures.future")
  thread: Any = getattr(module, "_SignalingThread", None)
  if thread is not None:
    # Each is started by Orbax, so that it cannot be told on its own.
    thread.daemon = property(lambda self: True, lambda self, value: None)


@functools.cache
def _silence_errors() -> None:
  """Drops what Orbax logs of errors that it raises as well."""

  def keep(entry: logging.LogRecord) -> bool:
    if "/orbax/checkpoint/" not in entry.pathname:
      return True
    # The latter is said of a folder that was removed meanwhile.
    return not entry.exc_info and "Skipping merge of" not in str(entry.msg)

  absl_logging.get_absl_logger().addFilter(keep)
