"""Errors that a user can correct, reported as one line."""

import difflib
import numbers as numbers_abc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Longest part of a name that is compared with options.
_LONGEST = 200


# Exit code of a mistake that a user can correct.
USER_ERROR_CODE = 2


class UserError(ValueError):
  """A mistake that the user can correct.

  The message is one line: what was wrong, the value seen, the nearest valid
  value and the flag to change. Entry points print it and exit with code 2.
  """


def did_you_mean(name: str, options: Iterable[str]) -> str:
  """Returns ' Did you mean "x"?' or the list of options if none is near."""
  options = sorted(options)
  # No option is near a far longer text, and comparing would be slow.
  near = difflib.get_close_matches(name[:_LONGEST], options, n=3, cutoff=0.6)
  if near:
    return " Did you mean " + " or ".join(f'"{x}"' for x in near) + "?"
  return " Valid: " + ", ".join(options) + "."


def list_few(parts: Sequence[str], most: int, separator: str = ", ") -> str:
  """Joins the first texts of a list, and reports how many more there are."""
  text = separator.join(parts[:most])
  if len(parts) > most:
    text += f"{separator.rstrip(', ')} and {len(parts) - most} more"
  return text


def check_lists(**values: object) -> None:
  """Raises `UserError` for a text in place of a list of texts.

  Args:
    **values: name -> value of an argument; a text would be read letter by
      letter.
  """
  for name, value in values.items():
    if isinstance(value, str):
      raise UserError(
        f'{name}="{value}" is one text; give a list: {name}={value.split(",")}'
      )


def check_fractions(**numbers: float | None) -> None:
  """Raises `UserError` for a number outside of [0, 1].

  Args:
    **numbers: flag -> its value; None is not checked.
  """
  _check_types(numbers, numbers_abc.Real, "a number")
  for flag, value in numbers.items():
    if value is not None and not 0 <= value <= 1:
      raise UserError(
        f"--{flag}={value:g} is not in [0, 1]; nearest valid:"
        f" --{flag}={1 if value > 1 else 0}"
      )


def check_counts(*, least: int = 1, **numbers: int | None) -> None:
  """Raises `UserError` for a number that is too low.

  Args:
    least: lowest valid number.
    **numbers: flag -> its value; None is not checked.
  """
  _check_types(numbers, numbers_abc.Integral, "a whole number")
  for flag, value in numbers.items():
    if value is not None and value < least:
      raise UserError(
        f"--{flag}={value} is below {least}; nearest valid: --{flag}={least}"
      )


def _check_types(numbers: Mapping[str, Any], kind: Any, name: str) -> None:
  """Raises `UserError` for an argument of the wrong type.

  Flags have the right type, so this is a mistake in a call from Python.
  """
  for argument, value in numbers.items():
    if value is not None and not isinstance(value, kind):
      text = f"{argument}={value!r} is {type(value).__name__}, not {name}"
      if isinstance(value, str):
        text += f"; nearest valid: {argument}={value}"
      raise UserError(text)
