"""Normalises the output of commands, so that two runs can be compared."""

import pathlib
import re

from narvl_jax.terminal import progress

_MASKS = (
  (r"\[ *[\d.]+s\]", "[TIME]"),
  (r"ETA \S+", "ETA TIME"),
  (r"loss \S+", "loss N"),
  (r"[\d.]+ ex/s", "N ex/s"),
  (r"goodput [\d.]+ .*", "goodput N"),
  (r"  data wait \d+ %", ""),
  # Padding depends on the number of digits.
  (r" +\d+\.\d( ± \d+\.\d)? %", "  N %"),
  (r" +\d+\.\d s\b", " N s"),
)
# A checkpoint is written while training continues.
_ANY_TIME = re.compile(r".*\] checkpoint of step \d+ saved\n")


def without_progress(text: str) -> str:
  """Removes lines of stderr that appear only on slow machines."""
  lines = text.splitlines(keepends=True)
  return "".join(x for x in lines if not x.startswith(progress.LINE_START))


def masked(text: str, **folders: pathlib.Path) -> str:
  """Replaces times, measured numbers and folders by names.

  Args:
    text: output of a command.
    **folders: name -> folder.
  """
  for name, folder in folders.items():
    text = text.replace(str(folder), name)
  text = _ANY_TIME.sub("", text)
  for pattern, name in _MASKS:
    text = re.sub(pattern, name, text)
  return text
