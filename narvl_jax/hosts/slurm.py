"""Expands the node lists of SLURM."""

import itertools
import math
import re

# Plain text, or numbers and ranges in brackets.
_PART = re.compile(r"\[([^\[\]]*)\]|([^\[\],\s]+)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
# More nodes than any cluster has.
_MAX_NODES = 1 << 20


def expand_nodes(text: str) -> list[str]:
  """Returns the nodes of a list in the order of `scontrol show hostnames`.

  Args:
    text: such as `login,rack[1-2]-gpu[01-10,12]`. The numbers of a range are
      padded with zeros to the length of the first one.

  Raises:
    ValueError: the text is not such a list, or has over a million nodes.
  """
  nodes: list[str] = []
  at = 0
  while True:
    parts: list[list[str]] = []
    while match := _PART.match(text, at):
      at = match.end()
      parts.append([match[2]] if match[1] is None else _numbers(match[1]))
      if len(nodes) + math.prod(map(len, parts)) > _MAX_NODES:
        raise ValueError(f"over {_MAX_NODES:,} nodes")
    if not parts or (at < len(text) and text[at] != ","):
      raise ValueError(f'"{text[:200]}" is not a list of nodes')
    nodes.extend("".join(names) for names in itertools.product(*parts))
    if at == len(text):
      return nodes
    at += 1


def _numbers(text: str) -> list[str]:
  """Expands the text between brackets, such as `001,007-015`."""
  numbers: list[str] = []
  for part in text.split(","):
    match = _RANGE.fullmatch(part)
    if match is None:
      raise ValueError(f'"[{text[:200]}]" is not a list of numbers')
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first):
      raise ValueError(f'the range "{part}" runs backwards')
    if int(last) - int(first) >= _MAX_NODES:
      raise ValueError(f"over {_MAX_NODES:,} nodes")
    numbers.extend(
      str(number).zfill(len(first))
      for number in range(int(first), int(last) + 1)
    )
  return numbers
