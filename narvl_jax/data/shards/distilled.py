"""Distilled data, whose targets are answers of a teacher."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from narvl_jax.data.batches.pipeline import Batcher
from narvl_jax.data.example import TASKS, Box, Record
from narvl_jax.data.record_checks import checked_record
from narvl_jax.data.shards.formats import format_of
from narvl_jax.data.shards.manifest import Manifest, read_manifest
from narvl_jax.data.shards.writer import PROGRESS
from narvl_jax.data.sources import MANIFEST, locate
from narvl_jax.data.sources.base import RecordSource
from narvl_jax.data.tasks import Task
from narvl_jax.errors import UserError

# Sums over the records of a shard; see `Labelled.counts`.
COUNTS = ("teacher", "original", "compared", "equal", "score", "objects")
# Columns of the source `ofa_tsv` that have no names of objects.
_WITHOUT_OBJECTS = "0,5,2,3"


class Label(NamedTuple):
  """Answer of a teacher.

  Attributes:
    value: text, or x0, y0, x1, y1 in pixels of the original image.
    score: log-probability.
  """

  value: str | Box
  score: float


def relabel(record: Record, label: Label, task: Task[Any]) -> Record | None:
  """Returns the record with the answer as its only target, of confidence 1.

  Returns:
    None if the answer cannot be a target: an empty text, an entailment other
    than yes, no and maybe, or a box without area.
  """
  if isinstance(label.value, str):
    if not label.value.strip():
      return None
    changes: dict[str, Any] = {
      "answers": {label.value: 1.0},
      "annotators": 0,
      "people": (),
    }
  else:
    changes = {"box": tuple(label.value)}
  new = dataclasses.replace(record, score=label.score, **changes)
  try:
    task.encode(new)
  except UserError:
    return None
  return new


class Labelled(RecordSource):
  """Records of a source with a teacher's answers as targets.

  A record keeps its own target if the answer cannot be a target.
  """

  def __init__(
    self,
    source: Sequence[Record],
    labels: Mapping[int, Label],
    task: Task[Any],
    batcher: Batcher,
  ) -> None:
    """Combines a source with labels.

    Args:
      labels: index in the source -> label, of all records that could be read.
      task: task of the teacher.
      batcher: batcher of the teacher; its error explains why a record has no
        label.
    """
    self.task, self.split = task.name, getattr(source, "split", "")
    self._source = source
    self._labels = labels
    self._task = task
    self._batcher = batcher
    self._counts: dict[int, dict[str, float]] = {}

  def __len__(self) -> int:
    return len(self._source)

  def _read(self, number: int) -> Record:
    record = checked_record(self._source[number])
    label = self._labels.get(number)
    if label is None:
      # Raises the error of the teacher.
      self._batcher.prepare(record, self._task, target="none")
      raise UserError("the teacher did not answer")
    new = relabel(record, label, self._task)
    ids = self._target_ids(record)
    objects = int(record.objects is not None)
    if new is None:
      if ids is None:
        raise UserError(
          f"the teacher's answer {label.value!r} is not a target, and the"
          " record"
          " has none either"
        )
      self._counts[number] = {"original": 1, "objects": objects}
      return record
    own = {"teacher": 1, "score": label.score, "objects": objects}
    if ids is not None:
      own |= {"compared": 1, "equal": int(ids == self._target_ids(new))}
    self._counts[number] = own
    return new

  def _place(self, number: int) -> str:
    return locate(self._source, number)

  def _target_ids(self, record: Record) -> list[int] | None:
    """Returns the target of a record as ids; None if it is unknown."""
    try:
      return self._task.encode(record).label_ids
    except UserError:
      return None

  def counts(self, indices: Sequence[int]) -> dict[str, float]:
    """Returns sums over the records that were read, of those in `indices`.

    Returns:
      "teacher": records with the teacher's answer. "original": records that
      kept their target. "objects": records with names of objects. Of those
      with the teacher's answer, "compared": those with an original target;
      "equal": those whose original target has the same ids; "score": sum of
      log-probabilities.
    """
    known = [self._counts[i] for i in indices if i in self._counts]
    return {key: sum(own.get(key, 0) for own in known) for key in COUNTS}


@dataclasses.dataclass(frozen=True)
class DistilledSet:
  """A data set that `narvl_jax.distill` wrote.

  Attributes:
    name: entry of the teacher's config.
    source: name of the source that reads the data set.
  """

  name: str
  task: str
  split: str
  source: str
  options: dict[str, Any]
  manifest: Manifest


def distilled_sets(
  folder: pathlib.Path, names: Sequence[str] = ()
) -> list[DistilledSet]:
  """Finds the data sets in the `--to` folder of `narvl_jax.distill`.

  Returns those in `names`, by default all.

  Raises:
    UserError: there is none, or one is incomplete.
  """
  found = [
    path.parent
    for path in sorted(folder.glob("*/" + MANIFEST))
    if not names or path.parent.name in names
  ]
  unfinished = sorted(
    path.parent.name
    for path in folder.glob("*/" + PROGRESS)
    if not (path.parent / MANIFEST).exists()
  )
  if unfinished:
    raise UserError(
      f'"{folder}" is not complete: {unfinished[0]} lacks answers; repeat the'
      " command python -m narvl_jax.distill that began it, to complete it"
    )
  sets = [_describe(path) for path in found]
  if not sets:
    raise UserError(
      f'"{folder}" has no distilled data; pass the folder that python -m'
      " narvl_jax.distill got as --to"
    )
  return sets


def _describe(folder: pathlib.Path) -> DistilledSet:
  manifest = read_manifest(folder)
  if manifest.labels is None or manifest.task not in TASKS:
    raise UserError(
      f'"{folder}" was not written by narvl_jax.distill; name it in an entry of'
      " data.train of its own"
    )
  source, options = "array_record", {"path": str(folder)}
  if any(format_of(x.file).suffix == ".tsv" for x in manifest.shards):
    source, options = "ofa_tsv", {"path": str(folder / "*.tsv")}
    if manifest.task == "vqa" and not manifest.labels["objects"]:
      options["columns"] = _WITHOUT_OBJECTS
  return DistilledSet(
    folder.name, manifest.task, manifest.split, source, options, manifest
  )


def summary(manifest: Manifest) -> str:
  """Returns a line about the targets of a data set."""
  labels = manifest.labels or dict.fromkeys(COUNTS, 0)
  answers, compared = labels["teacher"], labels["compared"]
  parts = [f"{manifest.records} records", f"{answers} answers"]
  if compared:
    equal = labels["equal"] / compared
    parts.append(f"{equal:.1%} of them equal to the original target")
  if answers:
    parts.append(f"mean log-probability {labels['score'] / answers:.3f}")
  if labels["original"]:
    parts.append(f"{labels['original']} of no use, the original target kept")
  if manifest.bad_records:
    parts.append(f"{len(manifest.bad_records)} bad records left out")
  return ", ".join(parts)


def how_to_use(folder: pathlib.Path, sets: Sequence[DistilledSet]) -> str:
  """Returns the lines of a config that reads the data sets."""
  lines = [
    "to train on them and on the original targets, half of the time each, in a",
    f"config whose data.train has {', '.join(found.name for found in sets)}:",
    "",
    "  from narvl_jax.configs.common import add_distilled",
    f'  add_distilled(config, "{folder}", weight=0.5)',
    "",
    "or one by one, with weights of your own:",
    "",
  ]
  for found in sets:
    options = "".join(f', {k}="{v}"' for k, v in found.options.items())
    lines += [
      f"  config.data.train.distilled_{found.name} = train_source(",
      f'    "{found.source}", "{found.task}", split="{found.split}"{options}',
      "  )",
    ]
  return "\n".join(lines)
