"""Scores a model on data sets of every task."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from narvl_jax.data import sources
from narvl_jax.data.example import Box, Record
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError, did_you_mean
from narvl_jax.evaluation import caption, entailment, grounding, vqa
from narvl_jax.evaluation.reporting import Prediction, Report
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.hosts import distributed
from narvl_jax.prediction.predictor import Answer, Predictor
from narvl_jax.terminal import progress

# (answer, record) -> metric -> score in [0, 1], the task's main metric first.
SCORERS: Mapping[str, Callable[[Any, Record], dict[str, float] | None]] = {
  "caption": caption.score,
  "vqa": vqa.score,
  "grounding": grounding.score,
  "entailment": entailment.score,
}


def evaluate_tasks(
  experiment: Experiment,
  variables: Any,
  *,
  split: str,
  max_examples: int | None = None,
  batch_size: int,
  step: int | None = None,
  decodings: Mapping[str, Decoding] | None = None,
  decoding_name: str = "greedy",
  tasks: Sequence[str] | None = None,
  before_batch: Callable[[], None] = lambda: None,
) -> tuple[Report, list[Prediction]]:
  """Answers every data set of `config.data.evaluation` and scores the answers.

  All tasks share one compiled predict step, and so do later calls with the
  same model and batch size. Several hosts share the examples and exchange the
  predictions at the end, so that all return the same.

  Args:
    experiment: model, vocabulary, tasks and config of the run.
    variables: of the model; the batch is split over their mesh, if any.
    split: such as "validation" or "test".
    max_examples: at most this many of every data set, spread evenly over it.
    batch_size: rounded up to a multiple of the devices that share a batch.
    step: training step of `variables`, for the report.
    decodings: by task; greedy for those that are not named.
    decoding_name: what the report calls `decodings`.
    tasks: whose data sets are answered; None: all.
    before_batch: called before each batch, on all hosts as often; what it
      raises ends the evaluation.

  Returns:
    The report and one prediction per example. The report has split, step,
    `decoding_name`, `decoding` (task -> settings), `max_examples`,
    `only_tasks` (None if all were evaluated), examples, `tasks` (task ->
    metric -> mean in [0, 1]), `counts` (task -> examples), `kinds` (task ->
    kind -> metrics and examples) and `datasets` (name -> task, metrics and
    examples). Records without ground truth count
    as examples and have no score; bad records count as neither.

  Raises:
    UserError: a data set, `split`, a task or too many records are at fault.
  """
  config: Any = experiment.config
  for name in tasks or ():
    if name not in experiment.tasks:
      known = list(experiment.tasks)
      raise UserError(
        f'--tasks: the run has no task "{name}".{did_you_mean(name, known)}'
      )
  predictor = Predictor(experiment, variables, decodings)
  predictions: list[Prediction] = []
  chosen = {
    name: entry
    for name, entry in config.data.evaluation.items()
    if not tasks or entry.task in tasks
  }
  for entry in chosen.values():
    # A way to decode that does not fit a task is told before any answer.
    predictor.steps(entry.task)
  opened = {name: load_dataset(config, name, split) for name in chosen}
  subsets = {
    name: Subset(source, spread(len(source), max_examples))
    for name, source in opened.items()
  }
  total = sum(map(len, subsets.values()))
  with progress.doing(f"evaluating {split}", total, "examples") as evaluating:
    for name, subset in subsets.items():
      before = evaluating.done
      for answer in predictor.answers(
        subset,
        chosen[name].task,
        batch_size=batch_size,
        before_batch=before_batch,
      ):
        place = {"dataset": name, "index": int(subset.indices[answer.index])}
        predictions.append(describe(answer) | place)
        # Other hosts answer those in between.
        evaluating.done = before + answer.index + 1
      evaluating.done = before + len(subset)
  predictions = _of_all_hosts(predictions, list(config.data.evaluation))
  report = summarise(predictions, split=split, step=step)
  every = list(dict.fromkeys(x.task for x in config.data.evaluation.values()))
  evaluated = list(dict.fromkeys(entry.task for entry in chosen.values()))
  report |= {
    "decoding_name": decoding_name,
    "decoding": {
      task: dataclasses.asdict((decodings or {}).get(task, Decoding()))
      for task in report["tasks"]
    },
    "max_examples": max_examples,
    "only_tasks": None if evaluated == every else evaluated,
  }
  return report, predictions


def _of_all_hosts(
  predictions: list[Prediction], datasets: Sequence[str]
) -> list[Prediction]:
  """Returns the predictions of all hosts in the order of a single one."""
  parts = distributed.gather_json(predictions)
  if len(parts) == 1:
    return predictions
  # Hosts that share rows have made the same ones.
  merged = {(p["dataset"], p["index"]): p for part in parts for p in part}
  order = {name: i for i, name in enumerate(datasets)}
  return [
    merged[key] for key in sorted(merged, key=lambda k: (order[k[0]], k[1]))
  ]


def describe(answer: Answer) -> Prediction:
  """Returns an answer and its scores as what JSON can hold.

  `scores` are the example's metrics, None without ground truth; `correct`
  says whether the main one is at least one half. `target` is the best answer
  or the box, `answers` are all valid ones with their scores.
  """
  record = answer.record
  scores = SCORERS[record.task](answer.value, record)
  target: str | Box | None = record.box
  if record.task != "grounding" and record.answers:
    target = max(record.answers, key=record.answers.__getitem__)
  return {
    "id": record.id,
    "task": record.task,
    "kind": record.kind,
    "prompt": record.prompt,
    "prediction": _plain(answer.value),
    "target": _plain(target),
    "probability": answer.probability,
    "correct": None if scores is None else next(iter(scores.values())) >= 0.5,
    "scores": scores,
    "answers": {k: float(v) for k, v in record.answers.items()},
  }


def summarise(
  predictions: Sequence[Prediction], *, split: str, step: int | None = None
) -> Report:
  """Averages predictions into the report that `evaluate_tasks` describes."""
  tasks = _group(predictions, "task")
  return {
    "split": split,
    "step": step,
    "examples": len(predictions),
    "tasks": {task: _means(group) for task, group in tasks.items()},
    "counts": {task: len(group) for task, group in tasks.items()},
    "kinds": {
      task: {
        kind: _means(members) | {"examples": len(members)}
        for kind, members in sorted(_group(group, "kind").items())
        if kind
      }
      for task, group in tasks.items()
    },
    "datasets": {
      name: {"task": group[0]["task"], "examples": len(group)} | _means(group)
      for name, group in _group(predictions, "dataset").items()
    },
  }


def spread(size: int, limit: int | None) -> np.ndarray:
  """Returns at most `limit` indices, evenly spread over `range(size)`."""
  count = size if limit is None else min(size, limit)
  return np.arange(count) * size // max(count, 1)


class Subset(Sequence[Record]):
  """Some records of a source, by position.

  Attributes:
    indices: their positions in the source, int [count].
  """

  def __init__(self, source: Sequence[Record], indices: np.ndarray) -> None:
    self._source, self.indices = source, indices

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: Any) -> Any:
    return self._source[int(self.indices[index])]

  def locate(self, index: int) -> str:
    """Returns where a record comes from."""
    return sources.locate(self._source, int(self.indices[index]))


def _plain(answer: str | Box | None) -> str | list[float] | None:
  if answer is None or isinstance(answer, str):
    return answer
  return [float(x) for x in answer]


def _group(
  predictions: Sequence[Prediction], key: str
) -> dict[str, list[Prediction]]:
  groups = collections.defaultdict(list)
  for prediction in predictions:
    groups[prediction[key]].append(prediction)
  return dict(groups)


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
  """Returns the mean of every metric over the predictions with a score."""
  scored = [p["scores"] for p in predictions if p["scores"] is not None]
  if not scored:
    return {}
  return {
    metric: float(np.mean([scores[metric] for scores in scored]))
    for metric in scored[0]
  }
