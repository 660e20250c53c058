"""Opens data sets that TFDS has prepared on this machine."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from tensorflow_datasets.core import constants, read_only_builder, registered

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.files import store_cache
from narvl_jax.files.schemes import StoreError
from narvl_jax.files.stores import as_path, is_remote, with_home
from narvl_jax.terminal import progress

_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_INFO = "dataset_info.json"
_STORE_THREADS = 16


def open_builder(name: str, data_dir: str) -> Any:
  """Returns the TFDS builder of a prepared data set; see `TfdsSource`.

  Raises:
    UserError: it is not prepared, or its file format has no random access.
  """
  with _errors_of(name), _errors_of(data_dir):
    if (with_home(name) / _INFO).exists():
      folder = str(with_home(name))
      builder = read_only_builder.builder_from_directory(folder)
    else:
      builder = _find(name, data_dir)
  found = builder.info.file_format
  if found != tfds.core.FileFormat.ARRAY_RECORD:
    value = getattr(found, "value", found)
    raise UserError(
      f'tfds: "{name}" in "{builder.data_dir}" is prepared as {value}, which'
      " has no random access; prepare it again elsewhere:"
      f" {_how_to_prepare(name, 'FOLDER')}, and set options.data_dir to FOLDER"
    )
  return builder


@contextlib.contextmanager
def _errors_of(name: str) -> Iterator[None]:
  """Turns errors of the store with the data sets, if any, into a UserError."""
  if not is_remote(name):
    yield
    return
  # Imports fsspec.
  from narvl_jax.files.store_errors import explained

  try:
    with explained(as_path(name)):
      yield
  except StoreError as error:
    raise UserError(f'tfds: "{name}": {error.strerror}') from error


def _find(name: str, data_dir: str) -> Any:
  match = _NAME.fullmatch(name)
  if match is None:
    raise UserError(
      f'tfds: "{name}" is not the name of a data set; it must be NAME,'
      " NAME/CONFIG"
      " or NAME:1.2.3, or a folder with dataset_info.json. Set options.name"
    )
  base, config, version = match.groups()
  given = {"config": config, "version": version}
  try:
    return read_only_builder.builder_from_files(
      base,
      data_dir=str(with_home(data_dir)) if data_dir else None,
      **{key: value for key, value in given.items() if value},
    )
  except registered.DatasetNotFoundError as e:
    raise UserError(_not_prepared(name, base, data_dir)) from e


def _not_prepared(name: str, base: str, data_dir: str) -> str:
  folder = with_home(data_dir or str(constants.DATA_DIR))
  prepared = [
    path.parent.relative_to(folder)
    for path in sorted(folder.glob("*/**/" + _INFO))
  ]
  # NAME/CONFIG/1.2.3, the config being optional.
  names = sorted({"/".join(path.parts[:-1]) for path in prepared} - {""})
  if base in {entry.split("/")[0] for entry in names}:
    hint = did_you_mean(name, names)
  elif names:
    hint = f" The folder has: {', '.join(names[:8])}."
  else:
    hint = ""
  return (
    f'tfds: "{name}" is not prepared in "{folder}".{hint} Prepare it in Python:'
    f" {_how_to_prepare(name, data_dir)}, or set options.data_dir or"
    " options.name"
  )


def _how_to_prepare(name: str, data_dir: str) -> str:
  """Returns a line of Python, because the command `tfds` needs TensorFlow."""
  where = f', data_dir="{data_dir}"' if data_dir else ""
  return (
    f'tensorflow_datasets.builder("{name}"{where},'
    ' file_format="array_record").download_and_prepare()'
  )


def data_source(builder: Any, split: str) -> Any:
  """Returns the examples of a split as serialized protocol buffers.

  Raises:
    UserError: there is no such split, a file is missing, or the split is empty.
  """
  names = sorted(builder.info.splits)
  try:
    info = builder.info.splits[split]
    count = info.num_examples
    parts = list(info.file_instructions)
    files = [as_path(str(part.filename)) for part in parts]
  except Exception as e:  # TFDS raises errors of many types.
    base = re.split(r"[\[+]", split)[0]
    hint = did_you_mean(base, names) if base not in names else ""
    raise UserError(
      f'tfds: {builder.info.full_name} has no split "{split}".{hint} A part'
      " is such as train[:50%]. Set --split, or data.train.NAME.split"
    ) from e
  try:
    copies = _copied(files)
  except FileNotFoundError as e:
    raise UserError(
      f'tfds: the file "{e.filename}" is missing; prepare the data set again'
    ) from e
  if not count:
    raise UserError(
      f'tfds: the split "{split}" of {builder.info.full_name} is empty;'
      " set split"
    )
  if copies != files:
    local: Any = [
      dataclasses.replace(part, filename=str(copy))
      for part, copy in zip(parts, copies, strict=True)
    ]
    return array_record_data_source.ArrayRecordDataSource(local)
  return builder.as_data_source(
    split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
  )


def _copied(files: list[pathlib.Path]) -> list[pathlib.Path]:
  """Returns the files, or local copies of those in a store.

  Raises:
    FileNotFoundError: one is missing.
    UserError: they are larger than the cache.
  """
  if not any(map(is_remote, files)):
    for file in files:
      file.stat()
    return files
  store_cache.check_room(
    f'tfds: the files of "{files[0].parent}"',
    sum(file.stat().st_size for file in files),
  )
  with (
    progress.doing(f"copying {files[0].parent}"),
    futures.ThreadPoolExecutor(_STORE_THREADS) as pool,
  ):
    return list(pool.map(store_cache.local_copy, files))
