"""Tables as text, in the one layout that all commands print."""

import shutil
import sys
from collections.abc import Sequence

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_GAP = "  "
# A line of dashes under the head and no other lines.
_HEAD_RULE = Box("    \n    \n----\n    \n    \n    \n    \n    ", ascii=True)


def format_columns(
  rows: Sequence[Sequence[str]],
  *,
  left: int = 1,
  rule: bool = True,
  indent: str = "",
  notes: Sequence[str] = (),
  width: int | None = None,
) -> str:
  """Returns rows as lines of aligned columns.

  A table wider than `width` has a block of lines for each row instead: the
  first cell, and below it the other cells, each after the name of its column.

  Args:
    rows: cells, equally many in every row; the first row is the head.
    left: number of columns, from the first, that are aligned to the left; the
      others are aligned to the right.
    rule: whether to draw a line under the head.
    indent: text before every line.
    notes: text after each row below the head, which may be empty; none by
      default.
    width: columns of the terminal; by default those of stdout, without limit
      if that is not a terminal.
  """
  if width is None:
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else sys.maxsize
  lines = _grid(rows, left, rule)
  for i, note in enumerate(notes, len(lines) - len(notes)):
    lines[i] += _GAP + note if note else ""
  if max(map(cell_len, lines)) + len(indent) > width:
    lines = _blocks(rows, notes, width - len(indent))
  return "\n".join(indent + line for line in lines)


def _grid(rows: Sequence[Sequence[str]], left: int, rule: bool) -> list[str]:
  table = Table(
    box=_HEAD_RULE if rule else None,
    show_header=rule,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1 if rule else len(_GAP), 0, 0),
  )
  head = rows[0] if rule else [""] * len(rows[0])
  for i, name in enumerate(head):
    justify = "left" if i < left else "right"
    table.add_column(Text(name), justify=justify, no_wrap=True)
  for row in rows[1 if rule else 0 :]:
    table.add_row(*map(Text, row))
  # Wider than any table: rich would otherwise shorten cells.
  columns = zip(*rows, strict=True)
  total = sum(max(map(cell_len, column)) + len(_GAP) for column in columns)
  console = Console(width=total, color_system=None, legacy_windows=False)
  with console.capture() as capture:
    console.print(table)
  return [line.rstrip() for line in capture.get().splitlines()]


def _blocks(
  rows: Sequence[Sequence[str]], notes: Sequence[str], width: int
) -> list[str]:
  """Returns a line for the first cell of each row, and the others below it."""
  lines = []
  for i, row in enumerate(rows[1:]):
    named = zip(rows[0][1:], row[1:], strict=True)
    parts = [f"{name} {cell.strip()}" for name, cell in named if cell]
    parts += filter(None, notes[i : i + 1])
    lines.append(row[0].rstrip())
    line = ""
    for part in parts:
      if line and cell_len(line + _GAP + part) > width:
        lines.append(line)
        line = ""
      line += _GAP + part
    if line:
      lines.append(line)
  return lines
