"""Checks data sets: figures, verdict and pictures of examples."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from narvl_jax.data import sources
from narvl_jax.data.checking import inspection
from narvl_jax.data.checking import report as check_report
from narvl_jax.data.checking.samples import draw_samples
from narvl_jax.data.example import Record
from narvl_jax.data.sources.subset import Subset, spread
from narvl_jax.data.tasks import Task, make_task, vocabulary_texts
from narvl_jax.data.vocabulary import files
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import Config, default_config
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.vocabulary import make_vocabulary
from narvl_jax.files.disk import replacing
from narvl_jax.files.stores import as_path
from narvl_jax.models import model_config
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show

# Ids of a learned vocabulary besides coordinates; records to learn from.
_LEARNT_IDS = 4000
_LEARNT_RECORDS = 4000


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a check.

  Attributes:
    num_queries: N of the model; that of the config if None.
    max_examples: number of records whose pictures are read; all if 0.
    all_texts: read the texts of all records.
    png: picture of examples to draw; none if "".
  """

  num_queries: int | None = None
  max_examples: int = 2000
  all_texts: bool = False
  num_threads: int = 2
  png: str = ""


@dataclasses.dataclass(frozen=True)
class CheckedSource:
  """A source to check.

  Attributes:
    name: name in the report and in file names.
    config: config with the limits and the settings of the task.
  """

  name: str
  source: Sequence[Record]
  task: str
  config: Config


def check(
  entry: CheckedSource,
  vocabulary: Vocabulary,
  *,
  num_queries: int | None = None,
  **options: Any,
) -> tuple[dict[str, Any], check_report.Verdict, Task[Any]]:
  """Checks a source; returns figures, verdict, and the task that read it.

  Args:
    vocabulary: vocabulary that determines lengths in tokens.
    **options: see `inspection.inspect`.
  """
  settings = dict(entry.config.tasks[entry.task])
  task = make_task(entry.task, vocabulary, settings)
  limits = _limits(entry.config, num_queries)
  if getattr(entry.source, "upright", False):
    # Its pictures were turned upright when it was converted.
    limits = dataclasses.replace(limits, exif_orientation="apply")
  figures = inspection.inspect(entry.source, task, limits, **options)
  verdict = check_report.judge(figures, entry.task, eos=task.settings.eos)
  return figures, verdict, task


def _limits(config: Config, num_queries: int | None) -> inspection.Limits:
  data = config.data
  names = ("num_queries", "max_text_positions")
  given = {
    name: config.model[name] for name in names if config.model[name] is not None
  }
  if num_queries:
    given["num_queries"] = num_queries
  model = model_config(config.model.size, **given)
  return inspection.Limits(
    image_size=tuple(data.image_size),
    max_text_length=data.max_text_length,
    max_label_length=data.max_label_length,
    num_queries=model.num_queries,
    max_text_positions=model.max_text_positions,
    max_bad_fraction=data.max_bad_fraction,
    exif_orientation=data.exif_orientation,
  )


def open_spec(
  spec: str, task: str, split: str, exif_orientation: str = "ignore"
) -> CheckedSource:
  """Opens a source with the limits of the default config.

  Args:
    spec: see `sources.open_source`.
    task: task of the records; may be empty if the source knows it.
    exif_orientation: see `data.exif_orientation`.

  Raises:
    UserError: the source cannot be opened, or its task is unknown.
  """
  note = sources.unused_split(spec, split)
  if note:
    show(f"note: {note}", file=sys.stderr)
  source = sources.open_source(
    spec, task=task, split=split, exif_orientation=exif_orientation
  )
  task = task or getattr(source, "task", "") or source[0].task
  name = pathlib.Path(spec.replace(":", "_")).stem
  config = default_config(task)
  config.data.exif_orientation = exif_orientation
  return CheckedSource(name, source, task, config)


def open_entries(config: Config, name: str, split: str) -> list[CheckedSource]:
  """Opens entries of a config.

  Args:
    name: name of an entry, optionally after "train." or "evaluation."; all
      entries if empty.
    split: split to read; by default that of the entry.

  Raises:
    UserError: there is no such entry, or it cannot be opened.
  """
  # The report covers texts that do not fit.
  validate(config, fit=False)
  data = config.data
  known = {f"train.{key}": entry for key, entry in data.train.items()}
  known |= {f"evaluation.{key}": e for key, e in data.evaluation.items()}
  chosen = [key for key in known if name in ("", key, key.split(".", 1)[1])]
  if not chosen:
    raise UserError(
      f'the config has no data "{name}".{did_you_mean(name, known)}'
      " Leave it out to check all"
    )
  opened = []
  for key in chosen:
    entry = known[key]
    own = entry.get("split", config.evaluation.split)
    source = sources.load_source(
      entry.source,
      task=entry.task,
      split=split or own,
      exif_orientation=data.exif_orientation,
      **dict(entry.get("options", {})),
    )
    opened.append(CheckedSource(key, source, entry.task, config))
  return opened


def find_vocabulary(
  folder: str, config: Config | None, entries: Sequence[CheckedSource]
) -> tuple[Vocabulary, str]:
  """Returns the vocabulary and its origin.

  Args:
    folder: folder with official files, a Hugging Face pair or the vocabulary
      of a run; may be empty.
    config: config that describes the vocabulary if there is no folder; if
      None, a vocabulary is learned.
    entries: sources to learn from.

  Raises:
    UserError: files of the vocabulary are missing or damaged.
  """
  if folder:
    return _read_vocabulary(as_path(folder)), folder
  if config is not None:
    kind = config.vocabulary.source
    how = (
      "learned from data.train" if kind == "train" else config.vocabulary.path
    )
    return make_vocabulary(config), how
  bins = entries[0].config.vocabulary.num_bins
  with progress.doing("training a vocabulary", unit="texts") as training:
    texts = []
    for entry in entries:
      source = entry.source
      records = Subset(source, spread(len(source), _LEARNT_RECORDS))
      for text in vocabulary_texts(
        entry.task, entry.config.tasks[entry.task], records
      ):
        texts.append(text)
        training.advance()
    # It contains every character, so it can encode almost any source.
    vocabulary = Vocabulary.train(
      texts or [" "], _LEARNT_IDS + bins, num_bins=bins
    )
  how = "learned from these texts; lengths differ with the official one"
  return vocabulary, how + " (--vocabulary=FOLDER)"


def _read_vocabulary(folder: pathlib.Path) -> Vocabulary:
  if (folder / "vocabulary.json").exists():
    return Vocabulary.load(folder)
  for source, names in files.NAMES.items():
    if (folder / names[0]).exists():
      return Vocabulary.from_files(source, [folder / name for name in names])
  raise UserError(
    f'"{folder}" has no vocabulary: neither dict.txt (official), nor'
    " vocab.json (Hugging Face), nor vocabulary.json (a run's folder"
    " vocabulary); set --vocabulary"
  )


def check_entries(
  entries: Sequence[CheckedSource], vocabulary: Vocabulary, options: Options
) -> tuple[dict[str, Any], check_report.Verdict]:
  """Checks sources; returns figures and verdict by name, and one on all."""
  several = len(entries) > 1
  report, verdicts = {}, {}
  for entry in entries:
    figures, verdict = _check_and_show(entry, vocabulary, options, several)
    report[entry.name], verdicts[entry.name] = figures, verdict
  merged = check_report.merge(verdicts)
  if several:
    show("\n" + check_report.format_word("verdict on all", merged))
  return report, merged


def _check_and_show(
  entry: CheckedSource, vocabulary: Vocabulary, options: Options, several: bool
) -> tuple[dict[str, Any], check_report.Verdict]:
  figures, verdict, task = check(
    entry,
    vocabulary,
    num_queries=options.num_queries,
    max_examples=options.max_examples,
    all_texts=options.all_texts,
    num_threads=options.num_threads,
  )
  title = f"\n{entry.name}: task {entry.task}"
  settings = dataclasses.asdict(task.settings)
  show(check_report.format_figures(title, figures, settings))
  if options.png:
    path = as_path(options.png)
    if several:
      path = path.with_name(f"{path.stem}_{entry.name}{path.suffix or '.png'}")
    picture = draw_samples(
      entry.name,
      entry.source,
      task,
      figures["samples"],
      figures["limits"]["image_size"],
    )
    if picture is not None:
      with replacing(path) as part:
        picture.save(part, format="PNG")
      show(f"\nexamples       {path}")
  show(check_report.format_verdict(verdict))
  figures.pop("samples")
  report = {"task": entry.task, **figures, "verdict": verdict._asdict()}
  return report, verdict
