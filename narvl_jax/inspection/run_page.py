"""A run as a page: curves, results, time, restarts, settings."""

import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from narvl_jax.data.example import TASKS
from narvl_jax.evaluation import reporting, results
from narvl_jax.experiment.config import default_config, to_json
from narvl_jax.files import side_files
from narvl_jax.files.regular import MAX_TEXT_BYTES, read_regular
from narvl_jax.inspection import evaluations, markup
from narvl_jax.inspection.charts import line_chart
from narvl_jax.inspection.markup import Markup, element
from narvl_jax.prediction import calibration
from narvl_jax.run_folder import METRICS_FILE, restarts, times, workdir
from narvl_jax.run_folder.goodput import goodput
from narvl_jax.terminal.activity import format_duration
from narvl_jax.terminal.text import brief

_SLOWEST = 5
_LONGEST_VALUE = 200
# Curves of training besides the loss: key of metrics.jsonl -> title.
_OTHER_CURVES = {
  "train/learning_rate": "Learning rate",
  "train/grad_norm": "Norm of the gradient",
  "train/examples_per_second": "Examples per second",
  "train/data_wait": "Share of time waiting for data",
}
_COUNTERS = ("skipped_updates", "rollbacks", "loss_spikes")
# Errors of reading a damaged or foreign file.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, TypeError)

Metrics = Sequence[Mapping[str, Any]]


def run_page(folder: pathlib.Path) -> str:
  """Returns the page of a run; missing and damaged parts are named as such.

  Args:
    folder: the run folder.
  """
  sections: tuple[tuple[str, Callable[[], Markup]], ...] = (
    ("Training", lambda: _training(folder)),
    ("Evaluation", lambda: _evaluation(folder)),
    ("Reliability of probabilities", lambda: _calibration(folder)),
    ("Time", lambda: _time(folder)),
    ("Slowest updates", lambda: _slowest(folder)),
    ("Restarts", lambda: _restarts(folder)),
    ("Settings that differ from the defaults", lambda: _settings(folder)),
    ("Environment", lambda: _environment(folder)),
  )
  return markup.page(
    f"Run {folder.resolve().name}",
    element("p", f"python -m narvl_jax.report {folder}", class_="faint"),
    *(markup.section(title, _guarded(part)) for title, part in sections),
  )


class _Missing(Exception):
  """A part of a run is not there; the message is shown in its place."""


def _guarded(part: Callable[[], Markup]) -> Markup:
  try:
    return part()
  except _Missing as reason:
    return markup.missing(str(reason))
  except (*_DAMAGE, ValueError) as error:
    why = f"{type(error).__name__}: {error}"
    return markup.missing(f"cannot be shown: a file is damaged ({why})")


def _read(folder: pathlib.Path, name: str, how: str) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    _Missing: there is none, or it is damaged.
  """
  try:
    data = read_regular(folder / name, MAX_TEXT_BYTES)
  except FileNotFoundError as error:
    raise _Missing(f"missing: there is no {name}; {how}") from error
  except OSError as error:
    raise _Missing(f"missing: {name} cannot be read ({error})") from error
  value = side_files.parse_object(data)
  if value is None:
    raise _Missing(f"missing: {name} is damaged: it is not a JSON object")
  return value


def _metrics(folder: pathlib.Path) -> Metrics:
  """Returns the lines of metrics.jsonl, of all restarts.

  Raises:
    _Missing: there are none.
  """
  lines = side_files.read_lines(
    folder / METRICS_FILE, lambda line: type(line.get("step")) is int
  )
  if not lines:
    raise _Missing(f"missing: there is no {METRICS_FILE}; `train` writes it")
  return lines


def _curve(lines: Metrics, key: str) -> list[tuple[float, float]]:
  """Returns (step, value) where the value is known and finite."""
  values = ((line["step"], line.get(key)) for line in lines)
  return [
    (step, float(value))
    for step, value in values
    if isinstance(value, int | float) and math.isfinite(value)
  ]


def _training(folder: pathlib.Path) -> Markup:
  lines = _metrics(folder)
  keys = list(dict.fromkeys(key for line in lines for key in line))
  losses = [x for x in keys if x == "train/loss" or x.startswith("train/nll/")]
  marks = [
    float(x["from_step"])
    for x in restarts.history(folder)
    if x.get("event") == "restart"
  ]

  def chart(title: str, names: Iterable[str], cut: str) -> Markup:
    curves = {x.removeprefix(cut): _curve(lines, x) for x in names}
    return line_chart(title, curves, marks)

  charts = [chart("Loss", losses, "train/")]
  splits: dict[str, list[str]] = {}
  for key in keys:
    split, _, rest = key.partition("/")
    if "/" not in rest or split in ("train", "data"):
      continue
    # A split that is evaluated only at the end has no curve.
    if len(_curve(lines, key)) > 1:
      splits.setdefault(split, []).append(key)
  for split, names in splits.items():
    charts.append(chart(f"Metrics of {split}", names, f"{split}/"))
  for key, title in _OTHER_CURVES.items():
    if key in keys:
      charts.append(chart(title, [key], "train/"))
  last = lines[-1]
  counts = ", ".join(
    f"{name.replace('_', ' ')} {last[f'train/{name}']:g}"
    for name in _COUNTERS
    if last.get(f"train/{name}") is not None
  )
  note = f"{len(lines)} lines of {METRICS_FILE}, until step {last['step']}"
  if marks:
    note += "; dashed lines: steps from which the run was resumed"
  return markup.join(
    [
      element("p", "; ".join(filter(None, (note, counts))), class_="faint"),
      element("div", *charts, class_="charts"),
    ]
  )


def _evaluation(folder: pathlib.Path) -> Markup:
  how = f"`python -m narvl_jax.evaluate --workdir={folder}` writes it"
  report = _read(folder, results.MAIN_FILE, how)
  parts: list[object] = [evaluations.evaluation(report)]
  name = reporting.file_name(report)
  for title, suffix in (("Samples", ""), ("Mistakes", "-mistakes")):
    path = folder / results.PREDICTIONS_FOLDER / f"{name}{suffix}.png"
    if not path.exists():
      # Earlier versions did not name the metrics.
      path = path.with_name(f"{name.removesuffix('-all')}{suffix}.png")
    parts.append(element("h3", title))
    try:
      parts.append(markup.png(read_regular(path, MAX_TEXT_BYTES), title))
    except OSError:
      shown = f"{results.PREDICTIONS_FOLDER}/{path.name}"
      parts.append(markup.missing(f"missing: there is no {shown}"))
  others = sorted((folder / results.EVALUATIONS_FOLDER).glob("*.json"))
  for path in others:
    if path.stem == name:
      continue

    def other(path: pathlib.Path = path) -> Markup:
      return evaluations.evaluation(_read(path.parent, path.name, how))

    summary = element("summary", path.stem)
    parts.append(element("details", summary, _guarded(other)))
  return markup.join(parts)


def _calibration(folder: pathlib.Path) -> Markup:
  values = _read(folder, calibration.FILE, "the probabilities are not adjusted")
  parts: list[object] = [evaluations.calibration(values)]
  for path in sorted(folder.glob("calibration*.png")):
    parts.append(markup.png(read_regular(path, MAX_TEXT_BYTES), path.stem))
  return markup.join(parts)


def _time(folder: pathlib.Path) -> Markup:
  records = times.processes(folder)
  if not records:
    raise _Missing(
      f"missing: there is no {times.TIMES_FILE}; `train` writes it"
    )
  found = goodput(records)
  causes = {"useful updates": found.useful, **found.lost}
  total: dict[str, float] = {}
  for record in records:
    for stage, seconds in record["seconds"].items():
      total[stage] = total.get(stage, 0.0) + seconds
  whole = sum(total.values())
  note = (
    f"{found}. {format_duration(whole)} in {len(records)} processes; a process"
    " that was killed is recorded by the next start"
  )
  return markup.join(
    [
      element("p", note, class_="faint"),
      _shares(causes, "wall time"),
      _shares(total, "stage"),
    ]
  )


def _shares(seconds: Mapping[str, float], name: str) -> Markup:
  """Returns a table of times and shares, the longest first."""
  whole = sum(seconds.values()) or 1.0
  rows = [
    (name, format_duration(value), f"{100 * value / whole:.1f} %")
    for name, value in sorted(seconds.items(), key=lambda x: -x[1])
    if value
  ]
  return markup.table(rows, (name, "time", "share"))


def _slowest(folder: pathlib.Path) -> Markup:
  lines = _metrics(folder)
  config = _read(folder, workdir.CONFIG_FILE, "the size of a batch is unknown")
  size = config["train"]["batch_size"]
  waits = dict(_curve(lines, "train/data_wait"))
  speeds = _curve(lines, "train/examples_per_second")
  seconds = [(size / x, step) for step, x in speeds if x > 0]
  if not seconds:
    raise _Missing("missing: no interval of training has a speed")
  rows = [
    (
      f"until step {step:g}",
      f"{value:.3g} s",
      f"{100 * waits.get(step, 0.0):.1f} %",
    )
    for value, step in sorted(seconds, reverse=True)[:_SLOWEST]
  ]
  middle = sorted(seconds)[len(seconds) // 2][0]
  note = (
    f"means over intervals of train.log_every updates; median {middle:.3g} s"
  )
  return markup.join(
    [
      element("p", note, class_="faint"),
      markup.table(rows, ("interval", "per update", "waiting for data")),
    ]
  )


def _restarts(folder: pathlib.Path) -> Markup:
  lines = restarts.summary(folder)
  if not lines:
    raise _Missing("none")
  return markup.join(element("p", line.strip()) for line in lines)


def _settings(folder: pathlib.Path) -> Markup:
  config = _read(folder, workdir.CONFIG_FILE, "it was lost")
  defaults = to_json(
    default_config(*(x for x in TASKS if x in config["tasks"]))
  )
  changes = workdir.diff(defaults, config)
  rows = [
    (key, *(brief(value, _LONGEST_VALUE) for value in values))
    for key, values in sorted(changes.items())
  ]
  return markup.table(rows, ("setting", "default", "this run"))


def _environment(folder: pathlib.Path) -> Markup:
  found = _read(folder, workdir.ENVIRONMENT_FILE, "`train` writes it")
  starts = [*found.get("previous", []), found]
  rows = [
    (
      start.get("started", ""),
      f"step {start.get('step', '?')}",
      " ".join(map(str, start.get("command", []))),
      ", ".join(f"{k} {v}" for k, v in start.get("devices", {}).items()),
      start.get("commit") or "unknown",
      ", ".join(f"{k} {v}" for k, v in start.get("versions", {}).items()),
    )
    for start in starts
  ]
  head = ("started", "from", "command", "devices", "commit", "versions")
  return markup.table(rows, head)
