"""A test fails if a Python process that it starts prints a warning."""

import subprocess
import sys

import pytest


def _run(code: str) -> None:
  subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )


@pytest.mark.parametrize(
  ("code", "message"),
  [
    ("import warnings; warnings.warn('old')", "UserWarning: old"),
    ("class A:\n  def __del__(self): 1 / 0\nA()", "Exception ignored in"),
  ],
)
def test_warnings_of_commands_are_errors(code: str, message: str) -> None:
  with pytest.raises(AssertionError, match=message):
    _run(code)


def test_other_words_are_not() -> None:
  _run("import sys; print('note: Warning: words', file=sys.stderr)")
