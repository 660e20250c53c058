"""Text in columns, as all commands print it."""

from collections.abc import Sequence

from rich.cells import cell_len

_GAP = "  "


def format_columns(
  rows: Sequence[Sequence[str]],
  *,
  left: int = 1,
  rule: bool = True,
  indent: str = "",
) -> str:
  """Returns rows as lines of aligned columns.

  Args:
    rows: cells of each, all with as many; the first row is the head.
    left: that many columns are aligned to the left (names), the others to the
      right (numbers).
    rule: draw a line under the head.
    indent: before every line.
  """
  columns = zip(*rows, strict=True)
  widths = [max(map(cell_len, column)) for column in columns]
  lines = []
  for row in rows:
    cells = []
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
      space = " " * (width - cell_len(cell))
      cells.append(cell + space if i < left else space + cell)
    lines.append(_GAP.join(cells).rstrip())
  if rule:
    lines.insert(1, "-" * max(map(cell_len, lines)))
  return "\n".join(indent + line for line in lines)
