"""Looks through a data set before a run does, and says what to change.

  python -m narvl_jax.check_data vqa.tsv --task=vqa [--vocabulary=FOLDER]
  python -m narvl_jax.check_data --config=configs/own_data.py [NAME]

SPEC is a file `*.tsv` or `*.jsonl`, a folder of ArrayRecord shards, `tfds:NAME`
or the name of a source. With `--config` it is the name of an entry of
`data.train` or `data.evaluation` (`train.NAME`, `evaluation.NAME` where both
have it), and all entries are checked without it.

Prints counts, bad records with file and row, lengths against the limits, and
as its last line a verdict with the flags to change. Draws five examples as the
model gets them. Exit code 0: good, or usable with the flags; 2: not
usable, or a mistake in the command.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line.json_output import (
  check_json_path,
  check_output_file,
  write_report,
)
from narvl_jax.data import sources
from narvl_jax.data.checking import inspection
from narvl_jax.data.checking import report as check_report
from narvl_jax.data.checking.samples import draw_samples
from narvl_jax.data.example import Record
from narvl_jax.data.pictures.files import EXIF_ORIENTATIONS
from narvl_jax.data.sources.subset import Subset, spread
from narvl_jax.data.tasks import Task, make_task, vocabulary_texts
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import USER_ERROR_CODE, UserError, did_you_mean
from narvl_jax.experiment.config import Config, default_config
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.vocabulary import make_vocabulary
from narvl_jax.files.disk import replacing
from narvl_jax.models import model_config
from narvl_jax.terminal import progress
from narvl_jax.terminal.text import show

# Ids of a learnt vocabulary besides coordinates, and records it learns from.
_LEARNT_IDS = 4000
_LEARNT_RECORDS = 4000


@dataclasses.dataclass(frozen=True)
class CheckedSource:
  """One source to check.

  Attributes:
    name: for the report and for files.
    source: its records.
    task: name of the task that reads them.
    config: the limits and the settings of the task.
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
  """Checks one source.

  Args:
    entry: what to check.
    vocabulary: for the lengths.
    num_queries: of the model, if another than the config's.
    **options: see `inspection.inspect`.

  Returns:
    The figures, the verdict, and the task that read the records.
  """
  settings = dict(entry.config.tasks[entry.task])
  task = make_task(entry.task, vocabulary, settings)
  limits = _limits(entry.config, num_queries)
  if getattr(entry.source, "upright", False):
    # Settled when it was converted.
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
  """Opens what the command names, with the limits of the default config.

  Args:
    spec: see `sources.open_source`.
    task: of the records; may be empty if the source knows it.
    split: to read.
    exif_orientation: see `data.exif_orientation`.

  Raises:
    UserError: it cannot be opened, or its task is not known.
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
    config: the config.
    name: of an entry, maybe with "train." or "evaluation." before it; all
      entries if empty.
    split: of the entries of `data.evaluation`; by default the config's.

  Raises:
    UserError: there is no such entry, or it cannot be opened.
  """
  # Texts that do not fit are part of the report.
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
  """Returns the vocabulary and where it is from.

  Args:
    folder: with official files, a Hugging Face pair or what a run saved; may
      be empty.
    config: whose vocabulary is taken otherwise; None: learns one.
    entries: to learn from.

  Raises:
    UserError: its files are missing or damaged.
  """
  if folder:
    return _read_vocabulary(pathlib.Path(folder)), folder
  if config is not None:
    kind = config.vocabulary.source
    how = (
      "learnt from data.train" if kind == "train" else config.vocabulary.path
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
    # Every character, so that hardly any source is too rich for it.
    vocabulary = Vocabulary.train(
      texts or [" "], _LEARNT_IDS + bins, num_bins=bins
    )
  how = "learnt from these texts; lengths differ with the official one"
  return vocabulary, how + " (--vocabulary=FOLDER)"


def _read_vocabulary(folder: pathlib.Path) -> Vocabulary:
  if (folder / "vocabulary.json").exists():
    return Vocabulary.load(folder)
  if (folder / "vocab.json").exists():
    return Vocabulary.from_huggingface(
      folder / "vocab.json", folder / "merges.txt"
    )
  if (folder / "dict.txt").exists():
    return Vocabulary.from_official(
      folder / "dict.txt", folder / "encoder.json", folder / "vocab.bpe"
    )
  raise UserError(
    f'"{folder}" holds no vocabulary: neither dict.txt (official), nor'
    " vocab.json (Hugging Face), nor vocabulary.json (a run's folder"
    " vocabulary); set --vocabulary"
  )


def define_flags() -> None:
  """Defines the flags of the command."""
  cli.define_config_flag()
  flags.DEFINE_string("task", "", "Task of the records.")
  common_flags.split("Split to read.")
  flags.DEFINE_string("vocabulary", "", "Folder with vocabulary files.")
  flags.DEFINE_integer(
    "num_queries", None, "N of the model, if not the config's.", lower_bound=1
  )
  common_flags.max_examples("Records read whole; 0: all.", 2000, lower_bound=0)
  flags.DEFINE_enum(
    "exif_orientation",
    None,
    EXIF_ORIENTATIONS,
    "Without --config: ignore or apply the EXIF orientation of pictures.",
  )
  flags.DEFINE_boolean("all", False, "Read the texts of all records.")
  flags.DEFINE_integer("num_threads", 2, "Threads that read.", lower_bound=1)
  common_flags.rename("threads", "num_threads")
  flags.DEFINE_string("png", "data_check.png", "Picture to draw; empty: none.")
  common_flags.json()


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  options = flags.FLAGS
  check_json_path(options.json)
  if options.png:
    check_output_file("png", options.png)
  spec = argv[1] if len(argv) > 1 else ""
  if options.config is not None:
    if options.exif_orientation:
      raise UserError(
        f"--exif_orientation={options.exif_orientation} is for a source without"
        " a config; set --config.data.exif_orientation="
        f"{options.exif_orientation}"
      )
    entries = open_entries(options.config, spec, options.split)
  elif spec:
    orientation = options.exif_orientation or "ignore"
    entries = [open_spec(spec, options.task, options.split, orientation)]
  else:
    raise UserError("nothing to check: name a source, or set --config=FILE")
  vocabulary, how = find_vocabulary(options.vocabulary, options.config, entries)
  show(f"vocabulary     {vocabulary.size:,} ids, {how}")
  report, verdicts = {}, {}
  for entry in entries:
    figures, verdict = _check_and_print(entry, vocabulary, len(entries) > 1)
    report[entry.name], verdicts[entry.name] = figures, verdict
  merged = check_report.merge(verdicts)
  if len(entries) > 1:
    show("\n" + check_report.format_word("verdict on all", merged))
  write_report(options.json, report, indent=1)
  sys.stdout.flush()
  unusable = merged.word == check_report.NOT_USABLE
  sys.exit(USER_ERROR_CODE if unusable else 0)


def _check_and_print(
  entry: CheckedSource, vocabulary: Vocabulary, several: bool
) -> tuple[dict[str, Any], check_report.Verdict]:
  options = flags.FLAGS
  figures, verdict, task = check(
    entry,
    vocabulary,
    num_queries=options.num_queries,
    max_examples=options.max_examples,
    all_texts=options.all,
    num_threads=options.num_threads,
  )
  title = f"\n{entry.name}: task {entry.task}"
  settings = dataclasses.asdict(task.settings)
  show(check_report.format_figures(title, figures, settings))
  if options.png:
    path = pathlib.Path(options.png)
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


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(0, 1), positional_name="the source")
