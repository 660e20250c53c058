"""Text that others wrote, where people and programs read it.

Texts of records, names of files, keys of checkpoints and messages of other
hosts may hold any character. On a terminal some of these do more than show
themselves: they set the title of the window, reverse the text that follows, or
end the program, as the terminal's encoding lacks them.
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
# line and paragraph separators; what has no width, but for the joiners, which
# belong to words and emoji; halves of surrogate pairs; tags.
_HIDDEN = re.compile(
  "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e"
  "\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape(text: str, keep: str = "") -> str:
  r"""Returns a text with visible escapes for characters that are not shown.

  Args:
    text: any text; "a\x1b[31mb" becomes r"a\x1b[31mb", one line.
    keep: characters that stay as they are.
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


def show(text: str, file: TextIO | None = None) -> None:
  """Prints lines; characters that cannot be shown become escapes.

  Args:
    text: one or several lines. A foreign text within them that must stay on
      its line is to be escaped first.
    file: stdout if None.
  """
  stream = sys.stdout if file is None else file
  encoding = getattr(stream, "encoding", None) or "utf-8"
  shown = escape(text, keep="\n\t").encode(encoding, "backslashreplace")
  with naming(stream):
    print(shown.decode(encoding), file=stream, flush=True)


@contextlib.contextmanager
def naming(stream: TextIO) -> Iterator[None]:
  """Lets errors of writing to a stream name it, as those of files do.

  Raises:
    UserError: it cannot be written.
    BrokenPipeError: nobody reads on.
  """
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    name = str(getattr(stream, "name", "the terminal")).strip("<>")
    raise UserError(
      f"{name} cannot be written: {error.strerror}; send it to a file or a pipe"
      " that takes it"
    ) from error


def show_error(
  kind: type[BaseException],
  error: BaseException,
  trace: TracebackType | None,
) -> None:
  """Prints a traceback on stderr; takes the place of `sys.excepthook`."""
  lines = traceback.format_exception(kind, error, trace)
  show("".join(lines).rstrip("\n"), file=sys.stderr)


class WarningFormatter(logging.PythonFormatter):
  """Starts what is logged with `warning: ` or `error: `, like other messages.

  absl's prefix of level, date, thread and line of code is 60 characters long.
  Lower levels, which `--verbosity` shows, keep it.
  """

  def format(self, record: LogRecord) -> str:
    """Returns the text of a record."""
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
  """Returns JSON that any string can be part of, a file or a terminal.

  Letters of all scripts stay readable; what `escape` escapes, halves of
  surrogate pairs included, is written as JSON escapes, and read back as it was.

  Args:
    value: what JSON can hold; without NaN and infinity.
    encoding: of where it is written; if it lacks a letter, all of them are
      escaped.
    indent: see `json.dumps`; one line if None.
  """
  dump = functools.partial(json.dumps, allow_nan=False, indent=indent)
  # Newlines are between values: within strings they are escaped already.
  text = _HIDDEN.sub(
    lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1],
    dump(value, ensure_ascii=False),
  )
  try:
    text.encode(encoding or "utf-8")
  except UnicodeEncodeError:
    return dump(value)
  return text
