"""Comparison of two trained runs: checks and batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.comparison.case import Case, Model, program_of
from narvl_jax.comparison.latency import Batch
from narvl_jax.comparison.ways import AR, NAR, choose, ways_of
from narvl_jax.data.example import Record
from narvl_jax.data.sources.subset import spread
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.experiment.config import to_json
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files.stores import as_path
from narvl_jax.parallel import activation_rules
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.prediction.readers import (
  answer_lengths,
  make_reader,
  reference_decoding,
)
from narvl_jax.run_folder import workdir as workdir_lib

# Both models must read the same pictures and prompts.
_SAME_DATA = ("image_size", "max_text_length", "exif_orientation")


@dataclasses.dataclass(frozen=True)
class Run:
  """A restored run.

  Attributes:
    flag: "nar" or "ar".
  """

  flag: str
  workdir: str
  experiment: Experiment
  variables: Any
  step: int

  def describe(self) -> dict[str, Any]:
    """Returns the entry of the report."""
    leaves = jax.tree.leaves(self.variables["params"])
    config = self.experiment.model_config
    return {
      "run": str(self.workdir),
      "step": self.step,
      "parameters": sum(leaf.size for leaf in leaves),
      "dtype": np.dtype(config.dtype).name,
      "vocabulary": self.experiment.vocabulary.fingerprint,
      "size": self.experiment.config.model.size,
    }


def open_runs(
  nar: str, ar: str, checkpoint: str | int, answers: str = ""
) -> dict[str, Run]:
  """Returns the runs "NAR" and "AR".

  Args:
    checkpoint: "best", "last" or a step.
    answers: file of the answers that VQA allows; those of the configs if "".

  Raises:
    UserError: a folder is not a run of its kind, or vocabularies, pictures or
      prompts differ.
  """
  for flag, path in (("nar", nar), ("ar", ar)):
    if not workdir_lib.is_run(as_path(path)):
      raise UserError(
        f'"{path}" has no run (--{flag}=RUN, a folder of narvl_jax.train)'
      )
  runs = {
    kind: Run(flag, path, *load_run(path, checkpoint))
    for kind, flag, path in ((NAR, "nar", nar), (AR, "ar", ar))
  }
  kinds = {kind: run.experiment.autoregressive for kind, run in runs.items()}
  if kinds[NAR] and not kinds[AR]:
    raise UserError(
      f"the runs are in each other's place, swap them: --nar={ar} --ar={nar}"
    )
  if kinds[NAR]:
    raise UserError(
      f"--nar={nar} is an autoregressive run; give one of the parallel model"
      ' (config.model.decoder="parallel")'
    )
  if not kinds[AR]:
    raise UserError(
      f"--ar={ar} is a run of the parallel model; give an autoregressive one"
      ' (config.model.decoder="autoregressive")'
    )
  _check_same(runs[NAR], runs[AR])
  if not answers:
    return runs
  return {
    kind: dataclasses.replace(
      run, experiment=with_answers(run.experiment, answers)
    )
    for kind, run in runs.items()
  }


def _check_same(nar: Run, ar: Run) -> None:
  one, other = (run.experiment.vocabulary.fingerprint for run in (nar, ar))
  if one != other:
    raise UserError(
      f"the runs have different vocabularies, {one[:12]} in {nar.workdir} and"
      f" {other[:12]} in {ar.workdir}; train one with the vocabulary of the"
      " other, or name others (--nar, --ar)"
    )
  for key in _SAME_DATA:
    values = [to_json(run.experiment.config.data)[key] for run in (nar, ar)]
    if values[0] != values[1]:
      raise UserError(
        f"data.{key} is {values[0]} in {nar.workdir} and {values[1]} in"
        f" {ar.workdir}; train one again with --config.data.{key} of the other,"
        " or name others (--nar, --ar)"
      )


def common_tasks(runs: dict[str, Run], wanted: Sequence[str]) -> list[str]:
  """Returns the tasks to compare.

  Raises:
    UserError: the runs share no task, or not a wanted one, or evaluate one on
      different data.
  """
  entries = {
    kind: to_json(run.experiment.config.data.evaluation)
    for kind, run in runs.items()
  }
  tasks = {
    kind: list(dict.fromkeys(entry["task"] for entry in found.values()))
    for kind, found in entries.items()
  }
  common = [task for task in tasks[NAR] if task in tasks[AR]]
  for task in wanted:
    if task not in common:
      raise UserError(
        f'--tasks: the runs do not share a task "{task}".'
        f"{did_you_mean(task, common)}"
      )
  if not common:
    raise UserError(
      f"the runs share no task: {', '.join(tasks[NAR])} (--nar) and"
      f" {', '.join(tasks[AR])} (--ar)"
    )
  chosen = list(dict.fromkeys(wanted)) or common
  for task in chosen:
    one, other = (
      {name: e for name, e in found.items() if e["task"] == task}
      for found in (entries[NAR], entries[AR])
    )
    if one != other:
      raise UserError(
        f"the runs evaluate {task} on different data: {one} and {other}; leave"
        " it out of --tasks, or name other runs (--nar, --ar)"
      )
  return chosen


def make_case(
  runs: dict[str, Run],
  task: str,
  split: str,
  *,
  beam_size: int,
  wanted: Sequence[str],
  uncached: bool,
) -> Case:
  """Returns the case of a task.

  Raises:
    UserError: a decoding does not fit the models, or there is no such split.
  """
  space, reason = None, "any text is an answer"
  try:
    space = runs[NAR].experiment.tasks[task].answer_space()
  except UserError as error:
    if getattr(runs[NAR].experiment.tasks[task].settings, "answers", ""):
      # The list exists but cannot be used.
      raise
    reason = str(error)
  reference = reference_decoding(runs[AR].experiment, task)
  ways = choose(
    ways_of(space, reason, reference, beam_size=beam_size, uncached=uncached),
    wanted,
  )
  models = {
    kind: Model.of(
      kind,
      run.experiment.model,
      run.variables,
      activation_rules(run.experiment.config.mesh.rules),
    )
    for kind, run in runs.items()
  }
  programs = {
    way.label: program_of(
      models[way.model],
      way.label,
      make_reader(runs[way.model].experiment, task, way.decoding),
      answer_lengths(runs[way.model].experiment, way.decoding),
    )
    for way in ways
    if way.decoding is not None
  }
  records = _records(runs[NAR].experiment, task, split)
  config: Any = runs[NAR].experiment
  data = config.config.data
  return Case(
    task,
    models,
    ways,
    programs,
    lambda size, count: _batches(runs, task, records, size, count),
    {
      "image_size": list(data.image_size),
      "text_length": data.max_text_length,
      "queries": config.model_config.num_queries,
    },
  )


def _records(experiment: Experiment, task: str, split: str) -> Sequence[Record]:
  """Returns the first data set of a task."""
  config: Any = experiment.config
  names = [n for n, e in config.data.evaluation.items() if e.task == task]
  return load_dataset(config, names[0], split)


def _batches(
  runs: dict[str, Run],
  task: str,
  records: Sequence[Record],
  size: int,
  count: int,
) -> list[Batch]:
  """Returns batches of records spread over a source.

  Raises:
    UserError: the prompts of the runs differ.
  """
  indices = np.resize(spread(len(records), size * count), size * count)
  batches = []
  for rows in indices.reshape(count, size):
    one, other = (
      _batch(run, task, [records[int(row)] for row in rows])
      for run in runs.values()
    )
    if not np.array_equal(one["text"], other["text"]):
      raise UserError(
        f"the runs make different prompts of the same {task} records; their"
        f" --config.tasks.{task} must be the same"
      )
    batches.append(one)
  return batches


def _batch(run: Run, name: str, records: Sequence[Record]) -> Batch:
  task, batcher = run.experiment.tasks[name], run.experiment.batcher
  batch = batcher.empty(len(records))
  for row, record in enumerate(records):
    batcher.write(batch, row, record, task, target="none")
  arrays = {key: batch[key] for key in ("image", "text", "image_mask")}
  return {**arrays, "merge_repeats": np.full(len(records), task.merge_repeats)}
