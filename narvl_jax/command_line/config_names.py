"""Configs by name: `--config=shapes:quick` from any folder."""

import pathlib
import re
from collections.abc import Sequence

import narvl_jax

CONFIGS = pathlib.Path(narvl_jax.__file__).parent / "configs"
# Modules that configs share.
_HELPERS = ("__init__", "common", "official")


def config_names() -> list[str]:
  """Returns the names of the configs that come with the package."""
  names = (path.stem for path in CONFIGS.glob("*.py"))
  return sorted(name for name in names if name not in _HELPERS)


def resolve_names(argv: Sequence[str]) -> list[str]:
  """Replaces names of configs in a command line by their files.

  `--config=shapes:quick` becomes `--config=.../configs/shapes.py:quick`. Files
  and unknown names are not changed.

  Args:
    argv: the command line, with flags in the form `--config=VALUE`.
  """
  known = config_names()

  def resolved(argument: str) -> str:
    match = re.fullmatch(r"(--?config=)(\w+)(:.*)?", argument, re.DOTALL)
    if match is None or match.group(2) not in known:
      return argument
    file = CONFIGS / f"{match.group(2)}.py"
    return f"{match.group(1)}{file}{match.group(3) or ''}"

  return [resolved(argument) for argument in argv]
