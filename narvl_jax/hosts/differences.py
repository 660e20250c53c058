"""Names the hosts that do not run what the others run."""

import collections
from collections.abc import Mapping, Sequence

_MAX_SHOWN = 8


def describe_differences(
  facts: Sequence[Mapping[str, str]], names: Sequence[str]
) -> str | None:
  """Compares what should be the same on every host.

  Args:
    facts: of each host, fact -> value. A name such as `config
      optimizer.learning_rate` is a group and a member of it.
    names: of the hosts.

  Returns:
    What differs from most others (from host 0 where there is no majority),
    in one line such as `host 3 (name): config differs: seed 1, the others 0`;
    None if nothing does.
  """
  odd: dict[int, dict[str, list[str]]] = collections.defaultdict(dict)
  keys = dict.fromkeys(key for own in facts for key in own)
  for key in keys:
    values = [own.get(key, "absent") for own in facts]
    # The first of equally frequent ones, so that of host 0.
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
      shown = "; ".join(found[:_MAX_SHOWN])
      if len(found) > _MAX_SHOWN:
        shown += f"; and {len(found) - _MAX_SHOWN} more"
      parts.append(f"host {host} ({names[host]}): {group} differs: {shown}")
  if len(odd) > _MAX_SHOWN:
    parts.append(f"and {len(odd) - _MAX_SHOWN} more hosts")
  return " | ".join(parts) + "; start all hosts with the same code and flags"
