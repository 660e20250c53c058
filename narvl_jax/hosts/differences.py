"""Reports hosts whose config, versions or code differ."""

import collections
from collections.abc import Mapping, Sequence

from narvl_jax.errors import list_few

_MAX_SHOWN = 8


def describe_differences(
  facts: Sequence[Mapping[str, str]], names: Sequence[str]
) -> str | None:
  """Compares facts that must be equal on every host.

  Args:
    facts: fact -> value, by host. A name such as `config seed` is a group and
      a member of it.

  Returns:
    One line such as `host 3 (name): config differs: seed 1, the others 0`,
    compared with the most frequent value (host 0's in a tie); None if all are
    equal.
  """
  odd: dict[int, dict[str, list[str]]] = collections.defaultdict(dict)
  keys = dict.fromkeys(key for own in facts for key in own)
  for key in keys:
    values = [own.get(key, "absent") for own in facts]
    # The first of equally frequent values is that of host 0.
    usual = collections.Counter(values).most_common(1)[0][0]
    for host, value in enumerate(values):
      if value == usual:
        continue
      group, _, member = key.rpartition(" ")
      rest = "the others" if len(facts) > 2 else "host 0"
      text = f"{value}, {rest} {usual}"
      odd[host].setdefault(group or member, []).append(
        f"{member} {text}" if group else text
      )
  if not odd:
    return None
  parts = []
  for host, groups in sorted(odd.items())[:_MAX_SHOWN]:
    for group, found in groups.items():
      shown = list_few(found, _MAX_SHOWN, "; ")
      parts.append(f"host {host} ({names[host]}): {group} differs: {shown}")
  if len(odd) > _MAX_SHOWN:
    parts.append(f"and {len(odd) - _MAX_SHOWN} more hosts")
  return " | ".join(parts) + "; start all hosts with the same code and flags"
