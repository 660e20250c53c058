"""Errors in lists of rules that start with a regex of parameter names."""

import difflib
import re
from collections.abc import Iterable, Sequence

from narvl_jax.errors import UserError


def compiled(key: str, pattern: str) -> re.Pattern[str]:
  """Compiles the regex of a rule of the config key `key`."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise UserError(
      f'{key}: regex "{pattern}" does not compile: {error}'
    ) from error


def raise_unused(
  key: str, pattern: str, names: Iterable[str], what: str
) -> None:
  """Raises UserError for a rule without effect.

  Args:
    key: config key of the rules.
    pattern: regex of the rule.
    names: names to which the rules apply.
    what: kind of the names, for the message.
  """
  names = list(names)
  if any(re.fullmatch(pattern, name) for name in names):
    why = "earlier rules match all its names"
  else:
    why = f"it matches no {what}." + _nearest(pattern, names)
  raise UserError(f'{key}: "{pattern}" is never used: {why} (--config.{key})')


def _nearest(pattern: str, names: Sequence[str]) -> str:
  """Returns ' Did you mean "x"?' for similar names and modules (`x/.*`)."""
  parts = [name.split("/") for name in names]
  modules = {"/".join(x[:n]) for x in parts for n in range(1, len(x))}
  near = difflib.get_close_matches(
    pattern.rstrip(".*/"), modules.union(names), n=3, cutoff=0.3
  )
  near = [f"{name}/.*" if name in modules else name for name in near]
  if not near:
    return ""
  return " Did you mean " + " or ".join(f'"{x}"' for x in near) + "?"
