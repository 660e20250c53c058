"""Distillation: predictions of a trained run replace the targets of data."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from narvl_jax.data.shards import conversion
from narvl_jax.data.shards.distilled import (
  DistilledSet,
  distilled_sets,
  how_to_use,
  summary,
)
from narvl_jax.data.shards.writer import PROGRESS, Job
from narvl_jax.data.sources import MANIFEST
from narvl_jax.errors import (
  UserError,
  check_counts,
  check_fractions,
  check_lists,
  did_you_mean,
)
from narvl_jax.evaluation.labelling import Labeller
from narvl_jax.experiment.config import to_json
from narvl_jax.files.paths import check_folder
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.hosts.cluster import LOG_FOLDER
from narvl_jax.terminal.activity import Activity
from narvl_jax.terminal.text import show


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of a distillation.

  Attributes:
    teacher: run folder.
    to: folder that receives a folder for each data set.
    spec: a data set, see `open_source`; if "", entries of the teacher's
      `data.train` are used.
    task: task of `spec`; may be "" if the source knows it.
    source_options: options of the source of `spec`.
    name: name of the data set of `spec`; by default that of its file or folder.
    datasets: names of entries; all by default.
    split: split to read; by default that of the entry, or of the source.
    checkpoint: "best", "last" or a step.
    decoding: see `decodings.decodings_for`; greedy if None.
    answers: file of the answers that VQA allows; that of the teacher's config
      if "".
    file_format: one of `FORMATS`.
    max_examples: number of first records of each data set; all if None or 0.
    batch_size: global batch size; that of the teacher's evaluation if None.
    shard_size: approximate number of records in a file.
    max_bad_fraction: largest fraction of bad records, which are left out; that
      of the teacher's config if None.
  """

  teacher: str
  to: str
  spec: str = ""
  task: str = ""
  source_options: Mapping[str, Any] | None = None
  name: str = ""
  datasets: Sequence[str] = ()
  split: str = ""
  checkpoint: str | int = "best"
  decoding: Mapping[str, Any] | None = None
  answers: str = ""
  file_format: str = "array_record"
  max_examples: int | None = None
  batch_size: int | None = None
  shard_size: int = 2000
  max_bad_fraction: float | None = None

  def __post_init__(self) -> None:
    """Checks the values."""
    check_lists(datasets=self.datasets)
    check_counts(batch_size=self.batch_size, shard_size=self.shard_size)
    check_counts(least=0, max_examples=self.max_examples)
    check_fractions(max_bad_fraction=self.max_bad_fraction)


# Name of a data set -> its job and what identifies it.
Jobs = dict[str, tuple[Job, dict[str, Any]]]


def distill(options: Options) -> list[DistilledSet]:
  """Writes the data sets that are incomplete, and prints a summary.

  Returns:
    The data sets, complete.

  Raises:
    UserError: no such run, checkpoint, data set or task; the folder contains
      something else; too many records are bad.
  """
  model = Labeller(
    options.teacher,
    checkpoint=options.checkpoint,
    decoding=options.decoding,
    answers=options.answers,
    batch_size=options.batch_size,
  )
  chosen = _chosen(model.config, options)
  folder = as_path(options.to)
  _check_folder(folder)
  jobs: Jobs = {}
  for key, data in chosen.items():
    # All sources are opened first, so that mistakes are reported at once.
    job, origin = conversion.plan(
      folder=str(folder / key),
      limit=options.max_examples or 0,
      shard_size=options.shard_size,
      format=options.file_format,
      exif_orientation=model.config.data.exif_orientation,
      size_flags="--max_examples or --shard_size",
      **{**data, "split": options.split or data["split"]},
    )
    origin["source"] |= {
      **model.prepare(job.task),
      "format": options.file_format,
    }
    jobs[key] = job, origin
  max_bad_fraction = options.max_bad_fraction
  if max_bad_fraction is None:
    max_bad_fraction = float(model.config.data.max_bad_fraction)
  for key, (job, origin) in jobs.items():
    _write(model, key, job, origin, max_bad_fraction)
  distributed.barrier("data sets written")
  done = distilled_sets(folder, list(jobs))
  show(f"\n{how_to_use(folder, done)}")
  return done


def _chosen(config: Any, options: Options) -> dict[str, dict[str, Any]]:
  """Returns name -> arguments of `conversion.plan`."""
  spec, names = options.spec, options.datasets
  if spec:
    if names:
      raise UserError(
        f"--datasets={','.join(names)} names entries of the teacher's"
        f' data.train, and "{spec}" is other data; drop one of them'
      )
    key = options.name or pathlib.PurePath(spec.replace(":", "_")).stem
    data = {
      "spec": spec,
      "task": options.task,
      "options": dict(options.source_options or {}),
      "split": "",
    }
    return {key: data}
  for flag in ("task", "name"):
    value = getattr(options, flag)
    if value:
      raise UserError(
        f"--{flag}={value} is for a data set that is named first; for entries"
        " of the teacher's data.train use --datasets=NAME,NAME"
      )
  entries = config.data.train
  for name in names:
    if name not in entries:
      raise UserError(
        f'--datasets: the teacher\'s data.train has no "{name}".'
        f"{did_you_mean(name, entries.keys())}"
      )
  return {
    name: {
      "spec": entry.source,
      "task": entry.task,
      "options": to_json(entry.get("options", {})),
      "split": entry.get("split", "train"),
    }
    for name, entry in entries.items()
    if not names or name in names
  }


def _check_folder(folder: pathlib.Path) -> None:
  """Raises UserError if a folder contains anything but distilled data."""
  check_folder("--to", folder)
  if not folder.is_dir():
    return
  for path in sorted(folder.iterdir()):
    known = path.is_dir() and (
      path.name == LOG_FOLDER
      or not any(path.iterdir())
      or any((path / part).exists() for part in (MANIFEST, PROGRESS))
    )
    if not known:
      raise UserError(
        f'--to="{folder}" contains something else: {path.name}; set --to to a'
        " new folder, or to one of narvl_jax.distill"
      )


def _write(
  teacher: Labeller,
  name: str,
  job: Job,
  origin: dict[str, Any],
  max_bad_fraction: float,
) -> None:
  """Writes a data set; the first host decides which shards are missing."""
  if not distributed.is_first():
    todo = distributed.gather_json(None)[0]
    for _ in teacher.write(job, todo):
      pass
    return
  sent = False

  def write(
    job: Job, todo: Sequence[int], answering: Activity
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    nonlocal sent
    sent = True
    distributed.gather_json(list(todo))
    yield from teacher.write(job, todo, answering)

  answered, seconds = teacher.answered, teacher.seconds
  show(
    f"{name}: {job.count} records of {job.task} for step {teacher.step} of"
    f" {teacher.workdir}",
  )
  manifest = conversion.convert(
    job,
    origin,
    max_bad_fraction=max_bad_fraction,
    log=show,
    write=write,
  )
  if not sent:
    distributed.gather_json([])
  line = f"{name}: {summary(manifest)}"
  if teacher.answered > answered:
    speed = (teacher.answered - answered) / (teacher.seconds - seconds)
    line += f"; {speed:.3g} examples/s"
  show(line)
