"""Settings of tasks and their checks."""

import dataclasses
import math
import string
from collections.abc import Mapping
from typing import Any, TypeVar

from narvl_jax.errors import UserError, did_you_mean

_FORMATTER = string.Formatter()


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings that every task has.

  Attributes:
    eos: targets end with eos, which needs one query. Targets of autoregressive
      models always end with eos.
    merge_repeats: decoding merges equal neighbours before it drops blanks.
    decoder_prompt: an autoregressive decoder reads the source before the
      answer.
    allow_empty: accept an empty prompt, premise or target, as the reference
      does.
  """

  eos: bool = True
  merge_repeats: bool = True
  decoder_prompt: bool = False
  allow_empty: bool = False


S = TypeVar("S", bound=Settings)


def parse_settings(
  name: str, settings_class: type[S], values: Mapping[str, Any]
) -> S:
  """Returns checked settings.

  Raises:
    UserError: a key is unknown, a value has the wrong type or is outside its
      range.
  """
  parsed: dict[str, Any] = {}
  fields = {f.name: f for f in dataclasses.fields(settings_class)}
  for key, given in values.items():
    value: Any = given
    flag = f"--config.tasks.{name}.{key}"
    if key not in fields:
      raise UserError(
        f'task "{name}" has no setting "{key}".{did_you_mean(key, fields)}'
        f" Change {flag}"
      )
    default = fields[key].default
    if isinstance(default, float) and type(value) is int:
      value = float(value)
    if type(value) is not type(default):
      raise UserError(
        f"{flag} is {value!r}, a {type(value).__name__}; it must be a"
        f" {type(default).__name__} such as {default!r}"
      )
    if isinstance(default, int) and value < 0:
      raise UserError(f"{flag} is {value}; it must be 0 (no limit) or more")
    if isinstance(default, float):
      _check_range(flag, value, fields[key].metadata.get("most", math.inf))
    if isinstance(default, str) and not fields[key].metadata.get("path"):
      _check_template(flag, value, default)
    parsed[key] = value
  return settings_class(**parsed)


def _check_range(flag: str, value: float, most: float) -> None:
  if not 0 <= value <= most:
    allowed = "0 or more" if most == math.inf else f"between 0 and {most:g}"
    nearest = f"; the nearest is {min(max(value, 0), most):g}"
    raise UserError(
      f"{flag} is {value:g}; it must be {allowed}"
      f"{'' if math.isnan(value) else nearest}"
    )


def _check_template(flag: str, value: str, default: str) -> None:
  """Checks that a template has as many places as its default."""

  def places(template: str) -> list[str]:
    return [
      field for _, field, *_ in _FORMATTER.parse(template) if field is not None
    ]

  try:
    seen = places(value)
  except ValueError as e:
    raise UserError(
      f'{flag} is "{value}": {e}; the default is "{default}"'
    ) from e
  if seen != places(default):
    raise UserError(
      f'{flag} is "{value}" with {len(seen)} places {{}}; it must have'
      f' {len(places(default))} like the default "{default}"'
    )
