r"""Replaces the targets of a data set by the answers of a trained teacher.

    python -m narvl_jax.distill --teacher=runs/ar --to=distilled
    python -m narvl_jax.distill --teacher=runs/ar --to=distilled \
      --datasets=caption,vqa --checkpoint=best --max_examples=1000
    python -m narvl_jax.distill vqa_train.tsv --task=vqa --teacher=runs/ar \
      --to=distilled --format=tsv

Every entry of the teacher's `data.train` (or those of --datasets, or the data
set that is named first, as for `narvl_jax.convert_data`) becomes a folder
DIR/NAME of shards with a manifest. Of a data set that is cut off by
--max_examples the first records are taken.

The teacher decodes as the official code does (--decoding=reference), or as
--decoding=beam --beam_size=5 and so on say.

Killed at any moment, the same command goes on with the shards that are not
there yet. Several hosts (--coordinator_address and so on) share the work and
the folder.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data.shards import conversion
from narvl_jax.data.shards.distilled import (
  DistilledSet,
  distilled_sets,
  how_to_use,
  summary,
)
from narvl_jax.data.shards.formats import FORMATS
from narvl_jax.data.shards.writer import PROGRESS, Job
from narvl_jax.data.sources import MANIFEST, parse_options
from narvl_jax.errors import (
  UserError,
  check_counts,
  check_lists,
  did_you_mean,
)
from narvl_jax.evaluation.labelling import Labeller
from narvl_jax.experiment.config import to_json
from narvl_jax.files.paths import check_folder
from narvl_jax.hosts import cluster as cluster_lib
from narvl_jax.hosts import distributed
from narvl_jax.prediction import decoding_flags
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure
from narvl_jax.reliability.interrupt import termination_raises
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.terminal.activity import Activity
from narvl_jax.terminal.text import show

# Name of a data set -> what is written, and what identifies it.
Jobs = dict[str, tuple[Job, dict[str, Any]]]


def distill(
  teacher: str,
  to: str,
  *,
  spec: str = "",
  task: str = "",
  options: Mapping[str, Any] | None = None,
  name: str = "",
  datasets: Sequence[str] = (),
  split: str = "",
  checkpoint: str | int = "best",
  decoding: Mapping[str, Any] | None = None,
  answers: str = "",
  file_format: str = "array_record",
  max_examples: int | None = None,
  batch_size: int | None = None,
  shard_size: int = 2000,
  max_bad_fraction: float | None = None,
) -> list[DistilledSet]:
  """Writes the data sets that are not there yet, and says how it went.

  Args:
    teacher: run folder.
    to: folder that gets a folder for each data set.
    spec: a data set, see `open_source`; "": entries of the teacher's
      `data.train`.
    task: of `spec`; may be "" if the source knows it.
    options: of the source of `spec`.
    name: of the data set of `spec`; by default that of its file or folder.
    datasets: names of entries; all by default.
    split: by default that of the entry, or of the source of `spec`.
    checkpoint: "best", "last" or a step.
    decoding: see `decoding_flags.decodings_for`; greedily if None.
    answers: file of the answers that VQA allows; that of the teacher's config
      if "".
    file_format: one of `FORMATS`.
    max_examples: the first records of each data set; all if None or 0.
    batch_size: of all devices; that of the teacher's evaluation if None.
    shard_size: records of a file, about.
    max_bad_fraction: share of a data set that may be bad and left out; that of
      the teacher's config if None.

  Returns:
    The data sets, complete.

  Raises:
    UserError: no such run, checkpoint, data set or task; a number out of
      range; the folder holds something else; too many records are bad.
  """
  check_lists(datasets=datasets)
  check_counts(batch_size=batch_size, shard_size=shard_size)
  check_counts(least=0, max_examples=max_examples)
  model = Labeller(
    teacher,
    checkpoint=checkpoint,
    decoding=decoding,
    answers=answers,
    batch_size=batch_size,
  )
  wanted = _chosen(
    model.config,
    datasets,
    {"spec": spec, "task": task, "options": dict(options or {})},
    name,
  )
  folder = pathlib.Path(to)
  _check_folder(folder)
  jobs: Jobs = {}
  for key, data in wanted.items():
    # All are opened first: what is wrong with one is told at once.
    job, origin = conversion.plan(
      folder=str(folder / key),
      limit=max_examples or 0,
      shard_size=shard_size,
      format=file_format,
      exif_orientation=model.config.data.exif_orientation,
      size_flags="--max_examples or --shard_size",
      **{**data, "split": split or data["split"]},
    )
    origin["source"] |= {**model.prepare(job.task), "format": file_format}
    jobs[key] = job, origin
  if max_bad_fraction is None:
    max_bad_fraction = float(model.config.data.max_bad_fraction)
  for key, (job, origin) in jobs.items():
    _write(model, key, job, origin, max_bad_fraction)
  distributed.barrier("data sets written")
  done = distilled_sets(folder, list(jobs))
  show(f"\n{how_to_use(folder, done)}")
  return done


def _chosen(
  config: Any, names: Sequence[str], given: dict[str, Any], name: str
) -> dict[str, dict[str, Any]]:
  """Returns name -> arguments of `conversion.plan`."""
  spec = given["spec"]
  if spec:
    if names:
      raise UserError(
        f"--datasets={','.join(names)} names entries of the teacher's"
        f' data.train, and "{spec}" is other data; drop one of them'
      )
    key = name or pathlib.PurePath(spec.replace(":", "_")).stem
    return {key: {**given, "split": ""}}
  for flag, value in (("task", given["task"]), ("name", name)):
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
  """Refuses a folder that holds anything but distilled data."""
  check_folder("--to", folder)
  if not folder.is_dir():
    return
  for path in sorted(folder.iterdir()):
    known = path.is_dir() and (
      path.name == hosts.LOG_FOLDER
      or not any(path.iterdir())
      or any((path / part).exists() for part in (MANIFEST, PROGRESS))
    )
    if not known:
      raise UserError(
        f'--to="{folder}" holds something else: {path.name}; set --to to a new'
        " folder, or to one of narvl_jax.distill"
      )


def _write(
  teacher: Labeller,
  name: str,
  job: Job,
  origin: dict[str, Any],
  max_bad_fraction: float,
) -> None:
  """Writes a data set; the first host decides what there is to do."""
  if not distributed.is_first():
    todo = distributed.gather_json(None)[0]
    for _ in teacher.write(job, todo):
      pass
    return
  told = False

  def write(
    job: Job, todo: Sequence[int], answering: Activity
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    nonlocal told
    told = True
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
    tell=show,
    write=write,
  )
  if not told:
    distributed.gather_json([])
  line = f"{name}: {summary(manifest)}"
  if teacher.answered > answered:
    speed = (teacher.answered - answered) / (teacher.seconds - seconds)
    line += f"; {speed:.3g} examples/s"
  show(line)


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("teacher", None, "Folder of the teacher's run.")
  common_flags.rename("workdir", "teacher")
  common_flags.to("Folder that gets the data sets.")
  common_flags.checkpoint()
  flags.DEFINE_list(
    "datasets", [], "Entries of the teacher's data.train; default: all."
  )
  common_flags.split("Split; that of the entry by default.")
  flags.DEFINE_string("task", "", "Task of a data set that is no entry.")
  flags.DEFINE_string("options", "{}", "Options of its source as JSON.")
  flags.DEFINE_string(
    "name", "", "Its name; default: that of the file or folder."
  )
  flags.DEFINE_enum("format", "array_record", [*FORMATS], "Of the shards.")
  common_flags.max_examples(
    "Only the first records of each data set; 0: all.", 0
  )
  common_flags.batch_size("Batch size; evaluation.batch_size by default.")
  common_flags.shard_size(old="examples_per_shard")
  common_flags.max_bad_fraction("; data.max_bad_fraction by default")
  common_flags.answers("the teacher's")
  decoding_flags.define_flags(default="reference")
  cluster_lib.define_flags()
  flags.mark_flags_as_required(["teacher", "to"])


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line says what to do."""
  settings = flags.FLAGS
  folder = pathlib.Path(settings.to)
  arguments = {
    "spec": argv[1] if argv[1:] else "",
    "task": settings.task,
    "options": parse_options(settings.options),
    "name": settings.name,
    "datasets": settings.datasets,
    "split": settings.split,
    "checkpoint": settings.checkpoint,
    "decoding": decoding_flags.from_flags(),
    "answers": settings.answers,
    "file_format": settings.format,
    "max_examples": settings.max_examples,
    "batch_size": settings.batch_size,
    "shard_size": settings.shard_size,
    "max_bad_fraction": settings.max_bad_fraction,
  }

  def explain(error: BaseException) -> tuple[int, str]:
    return explain_failure(error, folder)

  logs = folder / hosts.LOG_FOLDER
  try:
    cluster = cluster_lib.detect(settings)
    with (
      termination_raises(),
      hosts.outliving_terminal(logs if cluster is None else None),
      hosts.together(
        cluster,
        logs,
        lambda: workdir_lib.facts({"teacher": settings.teacher, **arguments}),
        explain,
        show,
      ),
    ):
      distill(settings.teacher, settings.to, **arguments)
  except UserError:
    raise
  except (KeyboardInterrupt, Exception) as error:
    hosts.end(error, *explain(error))


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(0, 1), positional_name="a data set")
