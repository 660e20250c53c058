"""The checkpoint manager of Orbax, configured for training runs."""

import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import flags
from absl import logging as absl_logging
from orbax.checkpoint import multihost as _defines_the_flag
from orbax.checkpoint import type_handlers
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from narvl_jax.checkpointing import record as record_lib
from narvl_jax.files.stores import as_path, is_remote

del _defines_the_flag

# Deleted checkpoints are first renamed into this folder, so that a process that
# is killed while it deletes leaves no partial checkpoint.
DELETED = ".deleted"
# Smallest part of a replicated array that one replica writes.
_MIN_SLICE_BYTES = 4 << 20
# Time limit for all hosts to write their parts of a checkpoint.
_SAVE_SECONDS = 1200


# All steps -> step -> reasons to keep it; a step without any is deleted.
Reasons = Callable[[list[int]], Mapping[int, Sequence[str]]]


class _Preservation:
  """`Reasons` as a preservation policy of Orbax."""

  def __init__(self, reasons: Reasons) -> None:
    self._reasons = reasons

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    del context
    steps = [checkpoint.step for checkpoint in checkpoints]
    reasons = self._reasons(steps)
    return [bool(reasons[step]) for step in steps]


def open_manager(
  folder: pathlib.Path,
  reasons: Reasons | None = None,
  note_error: Callable[[BaseException], None] = lambda error: None,
) -> ocp.CheckpointManager:
  """Returns the manager of a folder of checkpoints.

  Args:
    folder: the folder; created unless it is only read.
    reasons: reasons to keep checkpoints; None: the folder is only read.
    note_error: called in another thread as soon as a save fails on this host;
      Orbax itself raises only after waiting for the other hosts.
  """
  _split_only_large_arrays()
  # Barriers with a timeout instead of collectives that hang.
  flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True
  _silence_errors()
  _let_writers_end()
  if is_remote(folder):
    _know_stores()
  arrays = functools.partial(_ArrayHandler, note_error)
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=reasons and _Preservation(reasons),
      # Not `read_only`, with which Orbax logs a warning.
      create=reasons is not None,
      cleanup_tmp_directories=reasons is not None,
      todelete_subdir=DELETED,
      # Reading metadata of a damaged checkpoint would raise.
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


@functools.cache
def _know_stores() -> None:
  """Makes Orbax treat s3:// as gs://, and ask a bucket for nothing else.

  Of a store that cannot rename it knows gs:// only. It would also ask for the
  kind of the bucket, which writers of objects need not be allowed to; gcsfs
  handles both kinds.
  """
  modules: Any = (gcs_utils, tensorstore_utils)
  paths, arrays = modules
  normalize = arrays._normalize_path

  def address(path: str) -> str:
    return path if is_remote(path) else normalize(path)

  paths._GCS_PATH_PREFIX = ("gs://", "s3://")
  paths.is_hierarchical_namespace_enabled = lambda path: False
  paths.get_kvstore_for_gcs = lambda path: record_lib.kvstore(as_path(path))
  arrays._normalize_path = address
  arrays._use_gcs_driver = is_remote


class _Watched:
  """A future that reports its error."""

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
  """Writes and reads trees of arrays; reports errors early."""

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


@functools.cache
def _split_only_large_arrays() -> None:
  """Makes Orbax write a replicated array from one device unless it is large.

  Otherwise it splits every array over all replicas and compiles one slice for
  each device and shape: a minute at the first save on a CPU.
  """
  handler = type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES
  )
  verbosity = absl_logging.get_verbosity()
  # Overriding logs a warning.
  absl_logging.set_verbosity(absl_logging.ERROR)
  type_handlers.register_type_handler(jax.Array, handler, override=True)
  absl_logging.set_verbosity(verbosity)


@functools.cache
def _let_writers_end() -> None:
  """Makes the writer threads of Orbax daemons, so that the process can exit.

  After a failed save (a folder that cannot be created) they wait until the
  timeout of the save. `Checkpoints` waits for every other save.
  """
  module = sys.modules.get("orbax.checkpoint._src.futures.future")
  thread: Any = getattr(module, "_SignalingThread", None)
  if thread is not None:
    thread.daemon = property(lambda self: True, lambda self, value: None)


@functools.cache
def _silence_errors() -> None:
  """Drops log entries of errors that Orbax raises as well."""

  def keep(entry: logging.LogRecord) -> bool:
    if "/orbax/checkpoint/" not in entry.pathname:
      return True
    # "Skipping merge" is logged for a folder that was removed.
    return not entry.exc_info and "Skipping merge of" not in str(entry.msg)

  absl_logging.get_absl_logger().addFilter(keep)
