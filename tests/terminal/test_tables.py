"""Tables on terminals of any width."""

import io
import os
import shutil
import sys

import pytest
from rich.cells import cell_len

from narvl_jax.terminal.tables import format_columns

ROWS = [
  ("task", "examples", "accuracy", "exact match", "no prediction"),
  ("vqa", "4,000", "99.5 %", "98.0 %", "0.1 %"),
  ("  [b]kind 数", "12", "", "", "0.0 %"),
  ("grounding", "1,500,000", "7.5 %", "1.0 %", ""),
]
NOTES = ("", "(no ground truth)", "(step 5)")
WIDE = """\
task           examples  accuracy  exact match  no prediction
-------------------------------------------------------------
vqa               4,000    99.5 %       98.0 %          0.1 %
  [b]kind 数         12                                 0.0 %  (no ground truth)
grounding     1,500,000     7.5 %        1.0 %  (step 5)"""
NARROW = """\
vqa
  examples 4,000  accuracy 99.5 %
  exact match 98.0 %
  no prediction 0.1 %
  [b]kind 数
  examples 12  no prediction 0.0 %
  (no ground truth)
grounding
  examples 1,500,000  accuracy 7.5 %
  exact match 1.0 %  (step 5)"""


@pytest.mark.parametrize(
  ("width", "expected"), [(40, NARROW), (80, WIDE), (200, WIDE)]
)
def test_a_table_fits_into_the_terminal(width: int, expected: str) -> None:
  table = format_columns(ROWS, notes=NOTES, width=width)
  assert table == expected
  assert max(map(cell_len, table.splitlines())) <= width


@pytest.mark.parametrize("width", [40, 200])
def test_indent_counts(width: int) -> None:
  table = format_columns(ROWS, indent=" " * 6, rule=False, width=width)
  lines = table.splitlines()
  assert all(line.startswith(" " * 6) for line in lines)
  assert max(map(cell_len, lines)) <= width
  assert "---" not in table
  for cell in (cell for row in ROWS[1:] for cell in row):
    assert cell in table


class _Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
  size = os.terminal_size((40, 24))
  monkeypatch.setattr(shutil, "get_terminal_size", lambda: size)
  monkeypatch.setattr(sys, "stdout", io.StringIO())
  assert format_columns(ROWS, notes=NOTES) == WIDE
  monkeypatch.setattr(sys, "stdout", _Terminal())
  assert format_columns(ROWS, notes=NOTES) == NARROW


def test_a_cell_wider_than_the_terminal_stays_whole() -> None:
  name = "encoder/layers/attention/query/kernel" * 2
  rows = [("array", "shape"), (name, "768x768")]
  assert format_columns(rows, width=40) == f"{name}\n  shape 768x768"
