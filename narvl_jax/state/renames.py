"""`init_renames` and `init_drops`: rules that map stored names to ours.

A name is the path of a parameter, such as `decoder/layers/ffn/fc1_kernel`. A
rule for a module also applies to its running statistics, which have the same
paths in another collection.
"""

import collections
import re
from collections.abc import Iterable, Sequence
from typing import Any

from narvl_jax.errors import UserError
from narvl_jax.state.regex_rules import compiled, raise_unused

Renames = tuple[tuple[str, str], ...]
Drops = tuple[str, ...]


def parse_renames(renames: Iterable[Any]) -> Renames:
  """Parses `init_renames`, pairs (regex, replacement).

  Raises:
    UserError: an entry is not such a pair, or a regex does not compile.
  """
  parsed = []
  for entry in renames:
    if (
      not isinstance(entry, Sequence)
      or isinstance(entry, str)
      or len(entry) != 2
      or not all(isinstance(part, str) for part in entry)
    ):
      raise UserError(
        f"init_renames: {entry!r} is not a pair (regex of a stored name, name"
        r' here) such as ("encoder/old/(.*)", r"encoder/new/\1")'
      )
    pattern, replacement = entry
    regex = compiled("init_renames", pattern)
    try:
      # The alternative matches the empty text, so the groups are resolved.
      re.sub(f"{pattern}|", replacement, "")
    except (re.error, IndexError) as error:
      raise UserError(
        f'init_renames: "{replacement}" does not fit "{pattern}", which has'
        f" {regex.groups} groups: {error}"
      ) from error
    parsed.append((pattern, replacement))
  return tuple(parsed)


def parse_drops(drops: Iterable[Any]) -> Drops:
  """Parses `init_drops`, a list of regexes.

  Raises:
    UserError: an entry is not a text, or a regex does not compile.
  """
  parsed = []
  for pattern in drops:
    if not isinstance(pattern, str):
      raise UserError(
        f"init_drops: {pattern!r} is not the regex of a name such as"
        ' "decoder/query_embed"'
      )
    compiled("init_drops", pattern)
    parsed.append(pattern)
  return tuple(parsed)


def rename(stored: Sequence[str], renames: Renames) -> dict[str, str]:
  """Applies to each stored name the first rename that matches it as a whole.

  Args:
    stored: names with their collection, `params/...` or `batch_stats/...`,
      which the regexes do not see.
    renames: see `parse_renames`; a replacement may refer to groups.

  Returns:
    New name -> stored name, for all stored names.

  Raises:
    UserError: no name uses a rename, or two names become one.
  """
  found: dict[str, str] = {}
  used: set[str] = set()
  for whole in stored:
    collection, name = split(whole)
    new = name
    for pattern, replacement in renames:
      match = re.fullmatch(pattern, name)
      if match:
        new = match.expand(replacement)
        used.add(pattern)
        break
    other = found.setdefault(f"{collection}/{new}", whole)
    if other != whole:
      raise UserError(
        f'init_renames: "{split(other)[1]}" and "{name}" of the stored weights'
        f' would both become "{new}"; leave one of them out by'
        " --config.init_renames"
      )
  names = [split(whole)[1] for whole in stored]
  for pattern, _ in renames:
    if pattern not in used:
      raise_unused("init_renames", pattern, names, "stored name")
  return found


def dropped(names: Iterable[str], drops: Drops) -> set[str]:
  """Returns the names that a drop matches as a whole.

  Args:
    names: names with their collection, both stored ones, renamed, and ours.
    drops: see `parse_drops`.

  Raises:
    UserError: a drop matches no name.
  """
  by_name: dict[str, list[str]] = collections.defaultdict(list)
  for whole in names:
    by_name[split(whole)[1]].append(whole)
  found: set[str] = set()
  for pattern in drops:
    matched = [name for name in by_name if re.fullmatch(pattern, name)]
    if not matched:
      raise_unused("init_drops", pattern, by_name, "name there or here")
    for name in matched:
      found.update(by_name[name])
  return found


def split(whole: str) -> tuple[str, str]:
  """Splits `params/encoder/...` into collection and name."""
  collection, _, name = whole.partition("/")
  return collection, name
