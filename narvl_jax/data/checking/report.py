"""The report of `narvl_jax.check_data`, and its verdict."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from narvl_jax.data.checking import pictures as check_pictures
from narvl_jax.terminal.text import brief, escape

GOOD, USABLE, NOT_USABLE = "good", "usable with these flags", "not usable"
# Largest fraction of records beyond a limit that needs no flag.
_SPARED = 0.001
# Above this fraction of bad records the data is not usable.
_MAX_BAD = 0.2
_BAR = 40
_READ_AS = {
  "one": "one answer",
  "several": "a list of right answers (no repeats), each with score 1",
  "annotators": (
    "a list of annotators' answers (repeats), each with its VQA accuracy"
    " against the other annotators; the most frequent is the target"
  ),
  "scored": "answers with scores",
}
_BINS = 12


class Verdict(NamedTuple):
  """Whether data is usable.

  Attributes:
    word: one of `GOOD`, `USABLE`, `NOT_USABLE`.
  """

  word: str
  reasons: list[str]
  flags: list[str]


def judge(figures: Mapping[str, Any], task: str, *, eos: bool) -> Verdict:
  """Returns whether a run can use the records, and with which flags.

  Args:
    figures: output of `inspection.inspect`.
    eos: whether targets end with eos.
  """
  read, bad = figures["read"], figures["bad"]
  good = read - bad
  if not read:
    return Verdict(NOT_USABLE, ["there is no record"], [])
  reasons: list[str] = []
  flags, mended = check_pictures.orientation_flags(figures, reasons, _SPARED)
  # The flag fixes these.
  bad -= mended
  if not good and not mended:
    return Verdict(
      NOT_USABLE, [f"every record is bad; is it data for {task}?"], []
    )
  if bad > _MAX_BAD * read:
    reason = f"{_percent(bad, read)} of the records are bad: correct the data"
    return Verdict(NOT_USABLE, [reason], [])
  if 2 * figures["boxes_of_fractions"] > figures["boxes"]:
    reason = (
      "the boxes look like fractions of the picture; they must be pixels, x0,"
      " y0, x1, y1"
    )
    return Verdict(NOT_USABLE, [reason], [])
  reasons += check_pictures.picture_warnings(figures, _SPARED)
  flags += _length_flags(figures, reasons)
  flags += _query_flags(figures, task, eos, reasons)
  missing = figures["without_target"] if figures["with_target"] else 0
  unusable = (bad + missing) / read
  if unusable > figures["limits"]["max_bad_fraction"]:
    if any("has no area" in reason for reason in figures["reasons"]):
      reason = (
        f"{unusable:.2%} of the records are bad, some as their boxes have no"
        " area: are they x, y, width, height? They must be x0, y0, x1, y1"
      )
      return Verdict(NOT_USABLE, [reason], [])
    reasons.append(f"{unusable:.2%} of the records are bad or have no target")
    # A margin for records that were not read.
    flags.append(f"--config.data.max_bad_fraction={1.2 * unusable + 0.001:.3f}")
  if not figures["with_target"] and good:
    reasons.append("no record has a target: good for prediction only")
  return Verdict(USABLE if flags else GOOD, reasons, flags)


def merge(verdicts: Mapping[str, Verdict]) -> Verdict:
  """Returns the verdict on all sources of a run, given those on each."""
  words = {name: verdict.word for name, verdict in verdicts.items()}
  bad = [name for name, word in words.items() if word == NOT_USABLE]
  if bad:
    return Verdict(NOT_USABLE, [", ".join(bad)], [])
  largest: dict[str, str] = {}
  for verdict in verdicts.values():
    for flag in verdict.flags:
      name, value = flag.split("=")
      had = largest.setdefault(name, value)
      if had == value:
        continue
      if not _is_number(value):
        reason = (
          f"one source needs {name}={had}, another {flag}; convert one of them"
          " with narvl_jax.convert_data --image_size"
        )
        return Verdict(NOT_USABLE, [reason], [])
      largest[name] = max(had, value, key=float)
  flags = [f"{name}={value}" for name, value in largest.items()]
  return Verdict(USABLE if flags else GOOD, [], flags)


def _length_flags(figures: Mapping[str, Any], reasons: list[str]) -> list[str]:
  limits, good = figures["limits"], figures["read"] - figures["bad"]
  flags = []
  for count, lengths, limit, noun in (
    ("text_too_long", "text", "max_text_length", "prompts"),
    ("labels_too_long", "labels", "max_label_length", "targets"),
  ):
    if figures[count] <= _SPARED * good:
      continue
    needed = _fitting(figures["lengths"][lengths], 1 - _SPARED)
    reasons.append(
      f"{_percent(figures[count], good)} of the {noun} are longer than"
      f" data.{limit}={limits[limit]} and count as bad"
    )
    flags.append(f"--config.data.{limit}={needed}")
    positions = limits["max_text_positions"]
    if limit == "max_text_length" and needed > positions:
      flags.append(f"--config.model.max_text_positions={needed}")
  return flags


def _query_flags(
  figures: Mapping[str, Any], task: str, eos: bool, reasons: list[str]
) -> list[str]:
  good, queries = figures["with_target"], figures["limits"]["num_queries"]
  if figures["infeasible"] <= _SPARED * good:
    return []
  needed = _fitting(figures["lengths"]["queries"], 1 - _SPARED)
  reasons.append(
    f"{_percent(figures['infeasible'], good)} of the targets need more than"
    f" {queries} queries and contribute no gradient"
  )
  if eos and needed == queries + 1:
    reasons.append(
      "one query more is enough, or targets without eos:"
      f" --config.tasks.{task}.eos=False"
    )
  return [f"--config.model.num_queries={needed}"]


def format_verdict(verdict: Verdict) -> str:
  """Returns the last lines of a report."""
  reasons = [f"- {reason}" for reason in verdict.reasons]
  return "\n".join([*reasons, format_word("verdict", verdict)])


def format_word(heading: str, verdict: Verdict) -> str:
  """Returns a verdict in one line."""
  last = f"{heading}: {verdict.word}"
  if verdict.flags:
    last += ": " + " ".join(verdict.flags)
  elif verdict.word == NOT_USABLE:
    last += ": " + verdict.reasons[0]
  return last


def format_figures(
  title: str, figures: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
  """Returns the figures of one source as text.

  Args:
    figures: output of `inspection.inspect`.
  """
  total, read = figures["records"], figures["read"]
  pictures = figures["pictures_read"]
  lines = [title, f"records        {total:,}; {_extent(total, read, pictures)}"]
  lines += [f"note           {escape(note)}" for note in figures["notes"]]
  lines.append(f"bad records    {_share(figures['bad'], read)}")
  lines += [
    f"  {n} x {escape(reason)}" for reason, n in figures["reasons"].items()
  ]
  for row in figures["bad_rows"]:
    place = f'{escape(row["place"])} (id "{brief(row["id"])}")'
    lines.append(f"  {place}: {escape(row['error'])}")
  lines.append(_repeated(figures["repeated_ids"]))
  lines += check_pictures.picture_lines(figures)
  lines += _text_lines(figures, settings)
  return "\n".join(lines)


def _extent(total: int, read: int, pictures: int) -> str:
  if pictures == total:
    return "all were read"
  spread = f"{pictures:,}, evenly spread (--max_examples=0 reads all)"
  if read == total:
    return f"texts of all were read, pictures of {spread}"
  return f"read: {spread[:-1]}, --all the texts of all)"


def _repeated(repeated: Mapping[str, Any]) -> str:
  text = "repeated ids   none"
  if repeated["ids"]:
    text = (
      f"repeated ids   {repeated['ids']:,}, in {repeated['records']:,} records"
    )
  for example in repeated["examples"]:
    places = ", ".join(example["places"])
    text += f'\n  "{brief(example["id"])}": {escape(places)}'
  return text


def _text_lines(
  figures: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
  limits, lengths = figures["limits"], figures["lengths"]
  good, targets = figures["read"] - figures["bad"], figures["with_target"]
  lines = ["", "tokens of the prompt, with bos and eos"]
  limit = limits["max_text_length"]
  lines += _histogram(lengths["text"], limit, f"max_text_length={limit}")
  lines += _cut(figures["source_cut"], good, settings, "max_source_words")
  lines += ["", "labels of the target"]
  limit = limits["max_label_length"]
  lines += _histogram(lengths["labels"], limit, f"max_label_length={limit}")
  lines += _cut(figures["target_cut"], targets, settings, "max_target_words")
  if figures["without_target"]:
    lines.append(f"without target {_share(figures['without_target'], good)}")
  lines += ["", "queries that the target needs"]
  limit = limits["num_queries"]
  lines += _histogram(lengths["queries"], limit, f"num_queries={limit}")
  lines.append(f"infeasible     {_share(figures['infeasible'], targets)}")
  answers = figures["answers"]
  lines += _answers_read(figures["answers_read"])
  if answers["of"]:
    lines += ["", f"best answers   {answers['different']:,}, the most common:"]
    for answer, count in answers["most_common"].items():
      lines.append(f"  {count / answers['of']:6.1%} {brief(answer)}")
  if figures["kinds"]:
    kinds = (f"{brief(kind)} {n:,}" for kind, n in figures["kinds"].items())
    lines += ["", "kinds          " + ", ".join(kinds)]
  return lines


def _answers_read(read: Mapping[str, Mapping[str, int]]) -> list[str]:
  """Returns how the answers were read, unless every question has one."""
  if set(read) <= {"one"}:
    return []
  lines = ["", "answers read as"]
  for how, text in _READ_AS.items():
    if how in read:
      lines.append(f"  {sum(read[how].values()):>9,} {text}")
  people = read.get("annotators", {})
  if people:
    numbers = ", ".join(sorted(people, key=int))
    lines.append(f"  numbers of annotators: {numbers}")
  same = {
    n: count for n, count in read.get("several", {}).items() if n in people
  }
  for number, count in same.items():
    lines.append(
      f"  note: {count:,} lists of {number} answers have no repeat, so each"
      f" answer is right (score 1); if {number} annotators gave them, write"
      ' {"answer": score} instead'
    )
  return lines


def _cut(
  count: int, total: int, settings: Mapping[str, Any], key: str
) -> list[str]:
  if not settings.get(key):
    return []
  return [f"cut by {key}={settings[key]}: {_share(count, total)}"]


def _histogram(lengths: Mapping[str, int], limit: int, name: str) -> list[str]:
  """Returns lines with bars; bins beyond the limit are marked."""
  if not lengths:
    return ["  none"]
  values = {int(length): count for length, count in lengths.items()}
  low, high = min(values), max(values)
  width = max(1, -(-(high - low + 1) // _BINS))
  # The limit is the end of a bin.
  start = low - (low - limit - 1) % width
  bins: dict[int, int] = {}
  for value, count in values.items():
    first = start + (value - start) // width * width
    bins[first] = bins.get(first, 0) + count
  most, total = max(bins.values()), sum(bins.values())
  lines = []
  for first in range(start, high + 1, width):
    count = bins.get(first, 0)
    # No length is negative, wherever the first bin starts.
    last = first + width - 1
    span = f"{first}" if width == 1 else f"{max(first, 0)}-{last}"
    bar = "#" * -(-_BAR * count // most)
    mark = f"  > {name}" if first > limit and count else ""
    lines.append(
      f"  {span:>9} {count:>9,} {count / total:6.1%} {bar}{mark}".rstrip()
    )
  return [*lines, f"  limit: {name}, longest: {high}"]


def _fitting(lengths: Mapping[str, int], share: float) -> int:
  """Returns the smallest limit that a fraction of the lengths fits."""
  total, seen = sum(lengths.values()), 0
  for length in sorted(map(int, lengths)):
    seen += lengths[str(length)]
    if seen >= share * total:
      return length
  return 0


def _is_number(text: str) -> bool:
  try:
    float(text)
  except ValueError:
    return False
  return True


def _percent(count: int, total: int) -> str:
  return f"{count / total:.2%}" if total else "0 %"


def _share(count: int, total: int) -> str:
  return f"{count:,} of {total:,}" + (
    f" ({_percent(count, total)})" if count and total else ""
  )
