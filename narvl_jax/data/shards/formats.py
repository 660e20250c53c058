"""File formats of shards: ArrayRecord and OFA TSV."""

import abc
import base64
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from narvl_jax.data.example import Record
from narvl_jax.data.shards import records
from narvl_jax.data.sources.ofa_tsv import COLUMNS, SEPARATOR
from narvl_jax.errors import UserError

# Pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_BLOCK = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")


class ShardFormat(abc.ABC):
  """Writes records to a file and reads them; a record is stored as bytes."""

  suffix: str

  @abc.abstractmethod
  def serialize(self, record: Record) -> bytes:
    """Returns the stored form; raises `UserError` if the format has none."""

  @abc.abstractmethod
  def writing(
    self, path: str | os.PathLike[str]
  ) -> contextlib.AbstractContextManager[Callable[[bytes], Any]]:
    """Opens a new file; the context is a function that appends stored forms."""

  @abc.abstractmethod
  def read(self, path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the stored forms of a file."""

  @abc.abstractmethod
  def count(self, path: str | os.PathLike[str]) -> int:
    """Returns the number of records; 0 if the file is damaged."""


class _ArrayRecordFormat(ShardFormat):
  """ArrayRecord: random access, all fields of a record; see `records`."""

  suffix = ".array_record"

  def serialize(self, record: Record) -> bytes:
    return records.serialize(record)

  @contextlib.contextmanager
  def writing(
    self, path: str | os.PathLike[str]
  ) -> Iterator[Callable[[bytes], Any]]:
    writer = array_record_module.ArrayRecordWriter(
      os.fspath(path), _WRITER_OPTIONS
    )
    try:
      yield writer.write
    finally:
      writer.close()

  def read(self, path: str | os.PathLike[str]) -> Iterator[bytes]:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
      for position in range(reader.num_records()):
        yield reader.read([position])[0]
    finally:
      reader.close()

  def count(self, path: str | os.PathLike[str]) -> int:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    try:
      return reader.num_records()
    finally:
      reader.close()


class _TsvFormat(ShardFormat):
  """Rows for the source `ofa_tsv`, with the score in an additional column.

  Column 1 repeats the id; other columns that `ofa_tsv` does not read are empty.
  `kind` is lost. Tabs and line ends become spaces; unpaired surrogates, which
  UTF-8 cannot encode, become U+FFFD.
  """

  suffix = ".tsv"

  def serialize(self, record: Record) -> bytes:
    columns = COLUMNS[record.task]
    row = [""] * (max(columns) + 1)
    row[1] = record.id
    picture = base64.b64encode(records.encoded_image(record.image)).decode()
    cells = (record.id, picture, *_CELLS[record.task](record))
    for column, cell in zip(columns, cells, strict=True):
      row[column] = cell
    row.append("" if record.score is None else repr(float(record.score)))
    return "\t".join(" ".join(_lines(cell)) for cell in row).encode() + b"\n"

  @contextlib.contextmanager
  def writing(
    self, path: str | os.PathLike[str]
  ) -> Iterator[Callable[[bytes], Any]]:
    with open(path, "wb") as file:
      yield file.write

  def read(self, path: str | os.PathLike[str]) -> Iterator[bytes]:
    with open(path, "rb") as file:
      yield from file

  def count(self, path: str | os.PathLike[str]) -> int:
    lines = 0
    with open(path, "rb") as file:
      while block := file.read(_BLOCK):
        lines += block.count(b"\n")
    return lines


def _lines(cell: str) -> list[str]:
  cell = _SURROGATE.sub("\ufffd", cell)
  return cell.replace("\t", " ").replace("\0", " ").splitlines() or [""]


def _caption(record: Record) -> tuple[str, ...]:
  _check_answers(record)
  return (_joined(record.answers, record),)


def _vqa(record: Record) -> tuple[str, ...]:
  _check_answers(record)
  pairs = [f"{float(x)!r}|!+{answer}" for answer, x in record.answers.items()]
  objects = _joined(record.objects or (), record)
  return record.prompt, _joined(pairs, record), objects


def _grounding(record: Record) -> tuple[str, ...]:
  box = record.box or ()
  return record.prompt, ",".join(repr(float(x)) for x in box)


def _entailment(record: Record) -> tuple[str, ...]:
  answers = record.answers
  best = max(answers, key=answers.__getitem__) if answers else ""
  return record.prompt, record.premise, best


def _check_answers(record: Record) -> None:
  """Raises `UserError` for an answer without a character that can be stored."""
  for answer in record.answers:
    if not " ".join(_lines(answer)).strip():
      raise UserError(
        f"the answer {answer!r} has no character that a TSV file can hold; use"
        " --format=array_record"
      )


def _joined(texts: Any, record: Record) -> str:
  for text in texts:
    if SEPARATOR in text:
      raise UserError(
        f'{record.task} record "{record.id}" has {SEPARATOR!r} in {text!r},'
        " which separates texts in a TSV file; use --format=array_record"
      )
  return SEPARATOR.join(texts)


_CELLS: dict[str, Callable[[Record], tuple[str, ...]]] = {
  "caption": _caption,
  "vqa": _vqa,
  "grounding": _grounding,
  "entailment": _entailment,
}

FORMATS: dict[str, ShardFormat] = {
  "array_record": _ArrayRecordFormat(),
  "tsv": _TsvFormat(),
}


def format_of(path: str | os.PathLike[str]) -> ShardFormat:
  """Returns the format of a shard from its name; ArrayRecord by default."""
  name = os.fspath(path)
  return next(
    (f for f in FORMATS.values() if name.endswith(f.suffix)),
    FORMATS["array_record"],
  )
