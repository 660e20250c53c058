"""A trained model as a teacher: its answers become shards of new targets."""

import dataclasses
import functools
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from narvl_jax import experiment as experiment_lib
from narvl_jax.data.distilled import Label, Labelled
from narvl_jax.data.example import Record
from narvl_jax.data.pipeline import Batcher
from narvl_jax.data.shard_writer import Job, write_shard
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.decoding.settings import Decoding
from narvl_jax.errors import UserError
from narvl_jax.evaluation.evaluator import Subset
from narvl_jax.evaluation.predictor import Answer, Predictor
from narvl_jax.parallel import distributed, make_mesh, replicated
from narvl_jax.training import workdir as workdir_lib
from narvl_jax.training.checkpoints import Checkpoints, choose_step

# The logarithm of what a float32 rounds to 0 must be finite.
_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


class Teacher:
  """A run that answers; its weights are read when it is first asked.

  They lie on every device of all hosts, which share each batch.

  Attributes:
    workdir: folder of the run.
    config: of the run.
    step: of the checkpoint.
    vocabulary: fingerprint of its vocabulary.
    decodings: task -> how it is decoded; tasks that are not there: greedily.
    answered: records that were answered.
    seconds: that answering and writing them took.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    decodings: Mapping[str, Decoding] | None = None,
    batch_size: int | None = None,
  ) -> None:
    """Looks at the run.

    Args:
      workdir: folder of the run.
      checkpoint: "best", "last" or a step.
      decodings: see the class.
      batch_size: of all devices; `config.evaluation.batch_size` if None.

    Raises:
      UserError: there is no such run or checkpoint.
    """
    self.workdir = pathlib.Path(workdir)
    if not workdir_lib.is_run(self.workdir):
      raise UserError(
        f"--teacher={workdir} holds no run: there is no"
        f" {workdir_lib.CONFIG_FILE}; pass the --workdir of a training"
      )
    self.config: Any = workdir_lib.read_config(self.workdir)
    self.decodings = dict(decodings or {})
    self._batch_size = batch_size or self.config.evaluation.batch_size
    with Checkpoints(self.workdir) as checkpoints:
      self.step = choose_step(checkpoints, checkpoint)
    folder = self.workdir / experiment_lib.VOCABULARY_FOLDER
    self.vocabulary = Vocabulary.load(folder).fingerprint
    self.answered = 0
    self.seconds = 0.0

  def describe(self, task: str) -> dict[str, Any]:
    """Returns what the answers to a task depend on, as JSON can hold it."""
    return {
      "teacher": str(self.workdir.resolve()),
      "checkpoint_step": self.step,
      "vocabulary": self.vocabulary,
      "decoding": dataclasses.asdict(self._decoding(task)),
    }

  def _decoding(self, task: str) -> Decoding:
    return self.decodings.get(task, Decoding())

  @functools.cached_property
  def _loaded(self) -> tuple[experiment_lib.Experiment, Predictor]:
    experiment, variables, _ = experiment_lib.restore(
      self.workdir, self.step, sharding=replicated(make_mesh())
    )
    # Whoever writes the shards counts bad records, over all of them.
    experiment.config.data.max_bad_fraction = 1.0
    return experiment, Predictor(experiment, variables)

  def write(
    self, job: Job, todo: Sequence[int]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers shards and writes them; see `shard_writer.write_all`.

    All hosts answer each shard together. Then each writes one of as many
    shards as there are hosts, into a folder that they share.

    Args:
      job: the records to be answered, and where to write.
      todo: numbers of the shards, the same on all hosts.

    Yields:
      (number, note) of each shard on every host; the note also has "labels",
      see `Labelled.counts`.

    Raises:
      UserError: on all hosts: a shard cannot be written.
    """
    if not todo:
      return
    source = job.open()
    experiment, predictor = self._loaded
    count, own = jax.process_count(), jax.process_index()
    for first in range(0, len(todo), count):
      start = time.monotonic()
      group = todo[first : first + count]
      labels = [
        self._answer(predictor, job, source, number) for number in group
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
  ) -> dict[int, Label]:
    """Returns the answers to the good records of a shard, on all hosts."""
    indices = job.indices(number)
    # Batches begin with the shard: the answers do not depend, not even by
    # rounding, on which shards are there already.
    own = [
      (indices[answer.index], answer.value, _score(answer))
      for answer in predictor.answers(
        Subset(source, np.asarray(indices)),
        job.task,
        batch_size=self._batch_size,
      )
    ]
    # Hosts that share rows have the same answers.
    return {
      index: Label(value if isinstance(value, str) else tuple(value), score)
      for part in distributed.gather_json(own)
      for index, value, score in part
    }


def _write(
  experiment: experiment_lib.Experiment,
  job: Job,
  source: Sequence[Record],
  number: int,
  labels: Mapping[int, Label],
) -> dict[str, Any]:
  """Writes a shard; returns its note, or {"error": message}."""
  data = experiment.config.data
  batcher = Batcher(
    tuple(data.image_size), data.max_text_length, data.max_label_length
  )
  task = experiment.tasks[job.task]
  labelled = Labelled(source, labels, task, batcher)
  try:
    note = write_shard(labelled, job, number)
  except UserError as error:
    # The others wait for the note.
    return {"error": str(error)}
  bad = {record["index"] for record in note["bad"]}
  kept = [index for index in job.indices(number) if index not in bad]
  return {**note, "labels": labelled.counts(kept)}


def _score(answer: Answer) -> float:
  """Returns the log-probability of an answer."""
  return math.log(max(answer.probability, _SMALLEST))
