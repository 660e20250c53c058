"""Configs, run folders and evaluations of twins."""

import dataclasses
import datetime
import functools
import importlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from narvl_jax.benchmarks.twins_table import CHOICE_SPLIT, Row
from narvl_jax.checkpointing.runs import load_run
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.answers import collect_answers
from narvl_jax.data.example import TASKS
from narvl_jax.data.sources import load_source
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError
from narvl_jax.evaluation import distillation
from narvl_jax.evaluation.evaluator import evaluate_tasks
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.files.disk import replacing
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.prediction.readers import reference_decoding
from narvl_jax.run.training_run import train
from narvl_jax.run_folder import workdir as workdir_lib

# Records of the training split whose answers VQA allows.
_ANSWER_RECORDS = 5000
# Examples for the choice of a decoding.
_CHOICE_EXAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Study:
  """A data set on which twins are trained.

  Attributes:
    config: returns a new config of the parallel model.
    tasks: evaluated tasks.
    splits: reported splits.
    questions: name of its training data for VQA.
    captions: name of the training data that a twin labels; "": none.
    max_examples: of each reported split and task; all if None.
  """

  config: Callable[[], Any]
  tasks: tuple[str, ...]
  splits: tuple[str, ...]
  questions: str
  captions: str = ""
  max_examples: int | None = None


def _module(name: str) -> Any:
  """Imports a module of the folder `configs`."""
  try:
    return importlib.import_module(f"narvl_jax.configs.{name}")
  except ModuleNotFoundError as error:
    raise UserError(
      f"there is no module configs.{name}: {error}; start the command in the"
      ' folder of the repository, which contains "configs"'
    ) from error


def _config(name: str, variant: str = "") -> Any:
  return _module(name).get_config(variant)


def _shapes() -> Any:
  """Returns `shapes.py:long` without evaluations during training."""
  config = _config("shapes", "long")
  config.train.eval_every = 0
  return config


STUDIES: Mapping[str, Study] = {
  "shapes": Study(
    _shapes,
    TASKS,
    ("test", "held_out"),
    questions="vqa",
    captions="caption",
  ),
  "easy_vqa": Study(
    functools.partial(_config, "easy_vqa"),
    ("vqa",),
    ("test",),
    questions="questions",
  ),
}


@dataclasses.dataclass(frozen=True)
class Twins:
  """The runs of a study.

  Attributes:
    name: of the study.
    study: the data set.
    runs: folder of the run folders.
    labels: captions that a teacher predicts.
    trains: whether unfinished runs are trained.
  """

  name: str
  study: Study
  runs: pathlib.Path
  labels: int = 20_000
  trains: bool = True

  def folder(self, kind: str, seed: int) -> pathlib.Path:
    """Returns the run folder."""
    return self.runs / f"{self.name}_{kind}_{seed}"

  def config(self, kind: str, seed: int) -> Any:
    """Returns the config; "distilled" needs the teacher's captions."""
    config = self.study.config()
    config.seed = seed
    if kind == "ar":
      config.model.decoder = "autoregressive"
      # As the loss of its twin; otherwise short answers would hardly count.
      config.loss.average = "examples"
    if kind == "distilled":
      folder = str(self._captions(seed))
      # Half originals, which keep the variety of scenes.
      _module("common").add_distilled(config, folder, weight=0.5)
    return config

  def prepare(self, kind: str, seed: int) -> bool:
    """Trains a run, and its teacher first, unless they are finished.

    Returns:
      Whether the run is finished.

    Raises:
      UserError: its folder contains something else.
    """
    if kind == "distilled":
      if not self.prepare("ar", seed):
        return False
      options = distillation.Options(
        str(self.folder("ar", seed)),
        str(self._captions(seed)),
        datasets=[self.study.captions],
        checkpoint="last",
        # The reference forbids repeated trigrams, which captions of scenes
        # with similar objects contain.
        decoding={"method": "beam", "beam_size": 5},
        max_examples=self.labels,
      )
      distillation.distill(options)
    folder, config = self.folder(kind, seed), self.config(kind, seed)
    if _is_finished(folder, config):
      return True
    if not self.trains:
      print(f"{folder} is not finished, passed over", flush=True)
      return False
    train(config, folder)
    return True

  def measure(self, kind: str, seed: int) -> Row:
    """Returns the row of a finished run: its last checkpoint, all decodings."""
    start = time.monotonic()
    folder = self.folder(kind, seed)
    experiment, variables, step = load_run(folder, "last")
    if "vqa" in experiment.tasks:
      experiment = with_answers(experiment, self._answers())
    limits = dict.fromkeys(self.study.splits, self.study.max_examples)
    limits = {CHOICE_SPLIT: _CHOICE_EXAMPLES, **limits}
    results: dict[str, Any] = {}
    counts = {}
    for split, limit in limits.items():
      results[split] = {}
      for name, decodings in ways_to_decode(experiment):
        report, _ = evaluate_tasks(
          experiment,
          variables,
          split=split,
          max_examples=limit,
          step=step,
          decodings=decodings,
        )
        results[split][name] = report["tasks"]
        counts[split] = report["counts"]
        seconds = time.monotonic() - start
        print(f"{folder.name}: {split}, {name}: {seconds:.0f} s", flush=True)
    return {
      **{"data": self.name, "kind": kind, "seed": seed},
      **_facts(folder, experiment.config),
      "evaluation_seconds": round(time.monotonic() - start),
      "command": "python -m narvl_jax.benchmarks.twins --runs=runs/twins"
      f" --data={self.name} --kinds={kind} --seeds={seed}"
      + (f" --max_examples={self.labels}" if kind == "distilled" else ""),
      "examples": counts,
      "results": results,
    }

  def _captions(self, seed: int) -> pathlib.Path:
    # Absolute, because the config of the run has the path.
    return (self.runs / f"{self.name}_labels_{seed}").resolve()

  def _answers(self) -> pathlib.Path:
    """Returns a file of the training split's answers, written once."""
    path = self.runs / f"{self.name}_answers.txt"
    if not path.exists():
      entry = self.study.config().data.train[self.study.questions]
      source = load_source(
        entry.source, task=entry.task, split=entry.split, **entry.options
      )
      counts = collect_answers(source, entry.task, max_examples=_ANSWER_RECORDS)
      with replacing(path) as temporary:
        temporary.write_text("\n".join(counts) + "\n", encoding="utf-8")
    return path


def ways_to_decode(
  experiment: Experiment,
) -> Iterator[tuple[str, dict[str, Decoding]]]:
  """Yields (name, task -> decoding), the cheapest first.

  Only tasks with a set of answers are constrained.
  """
  tasks = experiment.tasks
  yield "greedy", {}
  if experiment.autoregressive:
    yield (
      "reference",
      {name: reference_decoding(experiment, name) for name in tasks},
    )
    return
  closed = {
    name: task.answer_space() is not None for name, task in tasks.items()
  }
  for name, method in (("constrained", "greedy"), ("beam", "beam")):
    yield (
      name,
      {task: Decoding(method, constrained=closed[task]) for task in tasks},
    )


def _is_finished(folder: pathlib.Path, config: Any) -> bool:
  if not workdir_lib.check(folder, config):
    return False
  with Checkpoints(folder) as checkpoints:
    return checkpoints.last_step == config.train.steps


def _facts(folder: pathlib.Path, config: Any) -> dict[str, Any]:
  """Returns date, hardware and length of a run."""
  environment = json.loads(
    (folder / workdir_lib.ENVIRONMENT_FILE).read_text(encoding="utf-8")
  )
  devices = environment["devices"]
  return {
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "device": f"{devices['count']} x {devices['kind']}",
    "jax": environment["versions"]["jax"],
    "steps": config.train.steps,
    "batch_size": config.train.batch_size,
    "training_seconds": _training_seconds(folder, config.train.batch_size),
  }


def _training_seconds(folder: pathlib.Path, batch_size: int) -> int:
  """Returns the seconds of all updates, without compilation and evaluation."""
  total, last = 0.0, 0
  with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
    for line in file:
      values = json.loads(line)
      rate = values.get("train/examples_per_second")
      if rate:
        total += (values["step"] - last) * batch_size / rate
        last = values["step"]
  return round(total)
