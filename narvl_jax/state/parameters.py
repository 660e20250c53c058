"""Parameters by path, and the training rule of each."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.traverse_util

from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.state.regex_rules import compiled, raise_unused

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ParameterRule:
  """Settings with which one parameter is trained.

  Attributes:
    lr: factor of the learning rate.
    decay: factor of the weight decay.
    freeze: whether it has no gradient and no optimizer state.
    rows: (first, last + 1) of the rows of a table that are trained; None: all.
  """

  lr: float = 1.0
  decay: float = 1.0
  freeze: bool = False
  rows: tuple[int, int] | None = None


def queries_only(blank_id: int) -> tuple[tuple[str, dict[str, Any]], ...]:
  """Returns `optimizer.rules` that train the queries and the blank's row.

  Args:
    blank_id: 59457 with the official vocabulary.
  """
  return (
    ("embed_tokens", {"rows": (blank_id, blank_id + 1)}),
    ("decoder/query_embed", {}),
    (".*", {"freeze": True}),
  )


def parse_rules(rules: Iterable[Any]) -> list[tuple[str, ParameterRule]]:
  """Parses `optimizer.rules`, pairs (regex, fields of `ParameterRule`).

  Raises:
    UserError: an entry is not such a pair, a regex does not compile, a field
      is unknown or has a value of the wrong type.
  """
  names = [field.name for field in dataclasses.fields(ParameterRule)]
  parsed = []
  for entry in rules:
    if (
      not isinstance(entry, Sequence)
      or len(entry) != 2
      or not isinstance(entry[0], str)
      or not isinstance(entry[1], Mapping)
    ):
      raise UserError(
        f"optimizer.rules: {entry!r} is not a pair (regex, settings) such as"
        ' (".*/bias", {"decay": 0.0})'
      )
    pattern, settings = entry
    compiled("optimizer.rules", pattern)
    for name, value in settings.items():
      if name not in names:
        raise UserError(
          f'optimizer.rules: "{pattern}" sets "{name}".'
          f"{did_you_mean(name, names)}"
        )
      if name == "rows":
        if not _is_range(value):
          raise UserError(
            f'optimizer.rules: "{pattern}" sets rows={value!r}, not (first,'
            " last + 1) such as (59457, 59458)"
          )
        continue
      number = isinstance(value, (bool, int, float)) and value >= 0
      if not number or (name == "freeze" and not isinstance(value, bool)):
        kind = "True or False" if name == "freeze" else "a number >= 0"
        raise UserError(
          f'optimizer.rules: "{pattern}" sets {name}={value!r}, not {kind}'
        )
    parsed.append((pattern, ParameterRule(**settings)))
  return parsed


def _is_range(value: Any) -> bool:
  """Returns whether a value is (first, last + 1) of some rows."""
  if not isinstance(value, (tuple, list)) or len(value) != 2:
    return False
  whole = all(isinstance(x, int) and x >= 0 for x in value)
  return whole and value[0] < value[1]


def assign_rules(
  rules: Iterable[Any], paths: Sequence[str]
) -> dict[str, ParameterRule]:
  """Returns path -> the first rule whose regex matches the full path.

  Args:
    rules: (regex, settings) pairs in order of priority.
    paths: parameter names such as `encoder/layers/mlp/kernel`.

  Raises:
    UserError: a parameter has no rule, or no parameter uses a rule.
  """
  parsed = parse_rules(rules)
  assigned: dict[str, ParameterRule] = {}
  used: set[str] = set()
  for path in paths:
    for pattern, rule in parsed:
      if re.fullmatch(pattern, path):
        assigned[path] = rule
        used.add(pattern)
        break
    else:
      raise UserError(
        f'optimizer.rules: no rule for parameter "{path}"; end the list with'
        ' a default, (".*", {})'
      )
  for pattern, _ in parsed:
    if pattern not in used:
      raise_unused("optimizer.rules", pattern, paths, "parameter")
  return assigned


def flatten(params: Params) -> dict[str, Any]:
  """Returns nested parameters as {path: leaf}, path joined by slashes."""
  return flax.traverse_util.flatten_dict(dict(params), sep="/")


def split_frozen(
  params: Params, rules: Mapping[str, ParameterRule]
) -> tuple[Params, Params]:
  """Splits nested parameters into the trained and the frozen ones."""
  trained, frozen = {}, {}
  for path, leaf in flatten(params).items():
    (frozen if rules[path].freeze else trained)[path] = leaf
  unflatten = flax.traverse_util.unflatten_dict
  return unflatten(trained, sep="/"), unflatten(frozen, sep="/")


def merge(trained: Params, frozen: Params) -> Params:
  """Inverts `split_frozen`."""
  return flax.traverse_util.unflatten_dict(
    {**flatten(trained), **flatten(frozen)}, sep="/"
  )
