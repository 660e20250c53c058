"""Prints untrusted text safely.

Texts of records, file names, keys of checkpoints and messages of other hosts
may contain any character. On a terminal some characters set the title of the
window or reverse the text after them. Others cannot be encoded, which would end
the program.
"""

import contextlib
import functools
import json
import re
import sys
import traceback
from collections.abc import Iterator
from logging import WARNING, Formatter, LogRecord
from types import TracebackType
from typing import Any, TextIO

from absl import logging

from narvl_jax.errors import UserError

# C0, DEL and C1 controls; marks, embeddings and isolates of text direction;
# line and paragraph separators; characters without width, except the joiners,
# which belong to words and emoji; unpaired surrogates; tags.
_HIDDEN = re.compile(
  "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
  "\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape(text: str, keep: str = "") -> str:
  r"""Replaces invisible characters by escapes.

  Args:
    text: any text; "a\x1b[31mb" becomes r"a\x1b[31mb", one line.
    keep: characters to keep.
  """

  def visible(found: re.Match[str]) -> str:
    character = found[0]
    if character in keep:
      return character
    return character.encode("unicode_escape").decode()

  return _HIDDEN.sub(visible, text)


def brief(text: str, longest: int = 60) -> str:
  """Returns the start of a text, escaped, for a cell of a table."""
  if len(text) > longest:
    text = text[: longest - 3] + "..."
  return escape(text)


def format_count(count: int, unit: str) -> str:
  """Returns "1 round" or "1,000 rounds"."""
  return f"{count:,} {unit}" + "s" * (count != 1)


def show(text: str, file: TextIO | None = None) -> None:
  """Prints lines; characters that cannot be printed become escapes.

  Args:
    text: one or several lines. Untrusted text within them that must stay on one
      line has to be escaped by the caller.
    file: stdout if None.
  """
  stream = sys.stdout if file is None else file
  encoding = getattr(stream, "encoding", None) or "utf-8"
  shown = escape(text, keep="\n\t").encode(encoding, "backslashreplace")
  with naming(stream):
    print(shown.decode(encoding), file=stream, flush=True)


@contextlib.contextmanager
def naming(stream: TextIO) -> Iterator[None]:
  """Adds the name of a stream to its write errors.

  Raises:
    UserError: the stream cannot be written.
    BrokenPipeError: its reader has ended.
  """
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    name = str(getattr(stream, "name", "the terminal")).strip("<>")
    raise UserError(
      f"{name} cannot be written: {error.strerror}; redirect it to a"
      " writable file or pipe"
    ) from error


def show_error(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  """Prints a traceback on stderr; replaces `sys.excepthook`."""
  lines = traceback.format_exception(kind, error, trace)
  show("".join(lines).rstrip("\n"), file=sys.stderr)


class WarningFormatter(logging.PythonFormatter):
  """Formats warnings and errors as `warning: TEXT` and `error: TEXT`.

  Lower levels, which `--verbosity` shows, keep the long prefix of absl.
  """

  def format(self, record: LogRecord) -> str:
    """Returns the text of a log record."""
    if record.levelno < WARNING:
      return super().format(record)
    return f"{record.levelname.lower()}: {Formatter.format(self, record)}"


@logging.skip_log_prefix
def warn(text: str) -> None:
  """Logs a warning of one line."""
  logging.warning("%s", escape(text))


def readable_json(
  value: Any, encoding: str | None = "utf-8", indent: int | None = None
) -> str:
  """Returns readable JSON that is safe on a terminal and in a file.

  Letters of all scripts are kept. Characters that `escape` escapes, including
  unpaired surrogates, become JSON escapes and are read back unchanged.

  Args:
    value: JSON value without NaN and infinity.
    encoding: encoding of the target; if it lacks a character, all non-ASCII
      characters are escaped.
    indent: see `json.dumps`; one line if None.
  """
  dump = functools.partial(json.dumps, allow_nan=False, indent=indent)
  # Newlines separate values; those within strings are escaped already.
  text = _HIDDEN.sub(
    lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1],
    dump(value, ensure_ascii=False),
  )
  try:
    text.encode(encoding or "utf-8")
  except UnicodeEncodeError:
    return dump(value)
  return text
