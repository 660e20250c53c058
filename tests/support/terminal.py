"""What commands print, without what differs between two runs."""

import pathlib
import re

from narvl_jax.terminal import progress

_MASKS = (
  (r"\[ *[\d.]+s\]", "[TIME]"),
  (r"ETA \S+", "ETA TIME"),
  (r"loss \S+", "loss N"),
  (r"[\d.]+ ex/s", "N ex/s"),
  (r"  data wait \d+ %", ""),
  # Spaces before a number depend on its digits.
  (r" +\d+\.\d %", "  N %"),
  (r" +\d+\.\d s\b", " N s"),
)
# A checkpoint is written while the run trains on.
_ANY_TIME = re.compile(r".*\] checkpoint of step \d+ saved\n")


def without_progress(text: str) -> str:
  """Returns a text of stderr without lines that only slow machines get."""
  lines = text.splitlines(keepends=True)
  return "".join(x for x in lines if not x.startswith(progress.LINE_START))


def masked(text: str, **folders: pathlib.Path) -> str:
  """Returns a text with names in the place of times and measured numbers.

  Args:
    text: what a command has printed.
    **folders: name -> the folder that it stands for.
  """
  for name, folder in folders.items():
    text = text.replace(str(folder), name)
  text = _ANY_TIME.sub("", text)
  for pattern, name in _MASKS:
    text = re.sub(pattern, name, text)
  return text
