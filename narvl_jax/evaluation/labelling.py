"""Distillation: predictions of a trained run become the targets of shards."""

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from narvl_jax.checkpointing.chosen import read_chosen
from narvl_jax.checkpointing.record_checks import check_config
from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.example import Record
from narvl_jax.data.shards.distilled import Label, Labelled
from narvl_jax.data.shards.writer import Job, write_shard
from narvl_jax.data.sources.subset import Subset
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import distributed
from narvl_jax.parallel import make_mesh, replicated
from narvl_jax.prediction.decodings import (
  check_answers_used,
  decodings_for,
)
from narvl_jax.prediction.predictor import Predictor
from narvl_jax.prediction.readers import make_reader
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.terminal.activity import Activity


class Labeller:
  """A trained run that labels records.

  Its weights are read when the first shard is written. They are replicated
  over the devices of all hosts, which share each batch.

  Attributes:
    workdir: run folder.
    config: config of the run.
    step: step of the checkpoint.
    answered: number of labelled records.
    seconds: time that labelling and writing took.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    decoding: Mapping[str, Any] | None = None,
    answers: str = "",
    batch_size: int | None = None,
  ) -> None:
    """Reads the config and chooses the checkpoint.

    Args:
      workdir: run folder.
      checkpoint: "best", "last" or a step.
      decoding: see `decodings.decodings_for`.
      answers: file of the answers that VQA allows; the config's if "".
      batch_size: over all devices; `config.evaluation.batch_size` if None.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    self.workdir = as_path(workdir)
    if not workdir_lib.is_run(self.workdir):
      raise UserError(
        f"--teacher={workdir} has no run: there is no"
        f" {workdir_lib.CONFIG_FILE}; pass the --workdir of a training"
      )
    self.config: Any = workdir_lib.read_config(self.workdir)
    self._batch_size = batch_size or self.config.evaluation.batch_size

    def choose(checkpoints: Checkpoints, step: int) -> int:
      record = checkpoints.read_record(step)
      check_config(self.workdir, self.config, record)
      return step

    self.step = read_chosen(self.workdir, checkpoint, choose)
    if answers:
      self._set_answers(answers)
    self._experiment = build_in(self.config, self.workdir)
    self._decodings = decodings_for(self._experiment, decoding)
    check_answers_used(self._decodings, answers)
    self._tasks: set[str] = set()
    self.answered = 0
    self.seconds = 0.0

  def _set_answers(self, path: str) -> None:
    if "vqa" not in self.config.tasks:
      raise UserError(
        f'--answers="{path}" is for vqa, on which the teacher was not trained;'
        " leave it out"
      )
    self.config.tasks.vqa.answers = path

  def prepare(self, task: str) -> dict[str, Any]:
    """Checks that the run can label a task; required before `write`.

    Returns:
      What the labels depend on, as JSON can hold it.

    Raises:
      UserError: the run was not trained on the task, or the decoding does not
        fit it.
    """
    if task not in self._decodings:
      raise UserError(
        f'the teacher was not trained on the task "{task}".'
        f"{did_you_mean(task, self._decodings)} (--task, --teacher)"
      )
    decoding = self._decodings[task]
    try:
      make_reader(self._experiment, task, decoding)
    except UserError as error:
      raise UserError(
        f"{error} (distill: or another --decoding, or other --datasets)"
      ) from error
    self._tasks.add(task)
    described = {
      "teacher": str(self.workdir.resolve()),
      "checkpoint_step": self.step,
      "vocabulary": self._experiment.vocabulary.fingerprint,
      "decoding": dataclasses.asdict(decoding),
    }
    if decoding.constrained or decoding.method == "candidates":
      allowed = repr(self._experiment.tasks[task].answer_space())
      described["answers"] = hashlib.sha256(allowed.encode()).hexdigest()
    return described

  @functools.cached_property
  def _loaded(self) -> tuple[Experiment, Predictor]:
    _, variables, _ = load_run(
      self.workdir, self.step, sharding=replicated(make_mesh())
    )
    config = self.config.copy_and_resolve_references()
    # The writer of the shards counts bad records, over all shards.
    config.data.max_bad_fraction = 1.0
    experiment = dataclasses.replace(self._experiment, config=config)
    decodings = {task: self._decodings[task] for task in self._tasks}
    return experiment, Predictor(experiment, variables, decodings)

  def write(
    self, job: Job, todo: Sequence[int], answering: Activity | None = None
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Labels shards and writes them; see `shard_writer.write_all`.

    All hosts label as many shards together as there are hosts. Then each host
    writes one of them into a shared folder.

    Args:
      job: the records and the place of the shards.
      todo: numbers of the shards, the same on all hosts.
      answering: counts the labelled records.

    Yields:
      (number, note) of each shard on every host; the note also has "labels",
      see `Labelled.counts`.

    Raises:
      UserError: a shard cannot be written; raised on all hosts.
    """
    if not todo:
      return
    source = job.open()
    experiment, predictor = self._loaded
    answering = answering or Activity("answering")
    count, own = jax.process_count(), jax.process_index()
    for first in range(0, len(todo), count):
      start = time.monotonic()
      group = todo[first : first + count]
      labels = [
        self._answer(predictor, job, source, number, answering)
        for number in group
      ]
      note = None
      if own < len(group):
        note = _write(experiment, job, source, group[own], labels[own])
      notes = distributed.gather_json(note)[: len(group)]
      self.seconds += time.monotonic() - start
      for number, note in zip(group, notes, strict=True):
        if "error" in note:
          raise UserError(note["error"])
        self.answered += len(job.indices(number))
        yield number, note

  def _answer(
    self,
    predictor: Predictor,
    job: Job,
    source: Sequence[Record],
    number: int,
    answering: Activity,
  ) -> dict[int, Label]:
    """Returns the labels of a shard's good records, on all hosts."""
    indices = job.indices(number)
    # Each shard has batches of its own, so that labels do not depend on the
    # shards that exist already, not even by rounding.
    own, before = [], answering.done
    for answer in predictor.answers(
      Subset(source, indices),
      job.task,
      batch_size=self._batch_size,
    ):
      own.append((indices[answer.index], answer.value, answer.log_prob))
      # Other hosts predict the records in between.
      answering.done = before + answer.index + 1
    answering.done = before + len(indices)
    # Hosts that share rows have the same labels.
    return {
      index: Label(value if isinstance(value, str) else tuple(value), score)
      for part in distributed.gather_json(own)
      for index, value, score in part
    }


def _write(
  experiment: Experiment,
  job: Job,
  source: Sequence[Record],
  number: int,
  labels: Mapping[int, Label],
) -> dict[str, Any]:
  """Writes a shard; returns its note, or {"error": message}."""
  task = experiment.tasks[job.task]
  labelled = Labelled(source, labels, task, experiment.batcher)
  try:
    note = write_shard(labelled, job, number)
  except UserError as error:
    # The other hosts wait for the note.
    return {"error": str(error)}
  bad = {record["index"] for record in note["bad"]}
  kept = [index for index in job.indices(number) if index not in bad]
  return {**note, "labels": labelled.counts(kept)}
