"""Twins: what is trained and measured once, and the table of the results."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax.linen import meta

from narvl_jax.benchmarks import twins, twins_runs, twins_table
from narvl_jax.benchmarks.twins_runs import Study
from narvl_jax.checkpointing.runs import build_in
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.shards.distilled import distilled_sets
from narvl_jax.decoding import Decoding
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.train_state import TrainState
from tests.evaluation import tiny_run

TASKS = ("caption", "vqa")
KINDS = ("nar", "ar", "distilled")
LABELS = 4


def tiny_config() -> Any:
  config = tiny_run.tiny_config().copy_and_resolve_references()
  for entries in (config.data.train, config.data.evaluation):
    for task in set(entries) - {*TASKS}:
      del entries[task]
  return config


STUDY = Study(
  tiny_config,
  TASKS,
  ("held_out",),
  questions="vqa",
  captions="caption",
  max_examples=4,
)


class Trainer:
  """Stands in for training: writes a finished run of random weights."""

  def __init__(self) -> None:
    self.trained: dict[str, Any] = {}

  def __call__(self, config: Any, workdir: pathlib.Path) -> None:
    self.trained[workdir.name] = config
    shutil.copytree(
      tiny_run.tiny_run() / VOCABULARY_FOLDER,
      workdir / VOCABULARY_FOLDER,
    )
    workdir_lib.write_config(workdir, config)
    workdir_lib.write_environment(workdir, 0)
    lines = [
      {"step": 400, "train/examples_per_second": 1280.0},
      {"step": 400, "validation/vqa/accuracy": 0.5},
      {"step": 1000, "train/examples_per_second": 640.0},
    ]
    (workdir / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
    )
    experiment = build_in(config, workdir)
    shapes = meta.unbox(experiment.abstract_variables())
    state = TrainState(
      step=jax.device_put(np.int32(config.train.steps)),
      params=tiny_run._random(shapes["params"]),
      batch_stats={},
      opt_state={"count": np.int32(0)},
      ema=None,
    )
    with Checkpoints(workdir, keep_last=1) as checkpoints:
      checkpoints.save(config.train.steps, state)


def patch_training(patch: pytest.MonkeyPatch) -> Trainer:
  stand_in = Trainer()
  patch.setattr(twins_runs, "train", stand_in)
  patch.setattr(twins_runs, "_CHOICE_EXAMPLES", 4)
  return stand_in


@pytest.fixture
def trainer(monkeypatch) -> Trainer:
  return patch_training(monkeypatch)


def few_ways(
  experiment: Experiment,
) -> Iterator[tuple[str, dict[str, Decoding]]]:
  """Stands in for all ways to decode, each of which would be compiled."""
  yield "greedy", {}
  if not experiment.autoregressive:
    yield "constrained", {"vqa": Decoding(constrained=True)}


def start(
  folder: pathlib.Path,
  *kinds: str,
  results: pathlib.Path | None = None,
  **options: Any,
) -> None:
  options = {"studies": {"tiny": STUDY}, "seeds": [3], **options}
  twins.run(
    folder / "runs",
    results or folder / "results.jsonl",
    kinds=kinds,
    labels=LABELS,
    **options,
  )


class Finished(NamedTuple):
  """Twins that were trained and measured."""

  folder: pathlib.Path
  trained: dict[str, Any]
  rows: dict[Any, dict[str, Any]]

  def copy_results(self, folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copy(self.folder / "results.jsonl", folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
  folder = tmp_path_factory.mktemp("twins")
  with pytest.MonkeyPatch.context() as patch:
    trainer = patch_training(patch)
    patch.setattr(twins_runs, "ways_to_decode", few_ways)
    start(folder, *KINDS)
  rows = twins_table.read_rows(folder / "results.jsonl")
  return Finished(folder, trainer.trained, rows)


def test_each_run_is_trained_and_measured(finished):
  assert list(finished.trained) == [f"tiny_{kind}_3" for kind in KINDS]
  rows = finished.rows
  assert list(rows) == [("tiny", kind, 3) for kind in KINDS]
  row = rows["tiny", "nar", 3]
  assert (row["steps"], row["batch_size"]) == (1000, 128)
  # 400 updates of 128 at 1280 examples/s, 600 at 640.
  assert row["training_seconds"] == 40 + 120
  assert row["jax"] == jax.__version__
  assert row["command"].endswith("--data=tiny --kinds=nar --seeds=3")
  assert str(finished.folder) not in json.dumps(rows["tiny", "distilled", 3])
  assert row["examples"]["held_out"] == {"caption": 4, "vqa": 4}
  assert list(row["results"]) == ["validation", "held_out"]
  for kind, ways in (("nar", ["greedy", "constrained"]), ("ar", ["greedy"])):
    for split in rows["tiny", kind, 3]["results"].values():
      assert list(split) == ways
      for tasks in split.values():
        assert list(tasks) == [*TASKS]
        assert 0 <= tasks["caption"]["exact_match"] <= 1


def test_configs_of_twins_differ_only_in_what_is_compared(finished):
  trained, runs = finished.trained, finished.folder / "runs"
  answers = (runs / "tiny_answers.txt").read_text().splitlines()
  assert answers[:2] == ["yes", "no"]
  base = workdir_lib.to_json(trained["tiny_nar_3"])
  assert base["seed"] == 3
  other = workdir_lib.to_json(trained["tiny_ar_3"])
  assert workdir_lib.diff(base, other) == {
    "model.decoder": ("(unset)", "autoregressive"),
    "loss.average": ("labels", "examples"),
  }
  student = trained["tiny_distilled_3"]
  (found,) = distilled_sets(runs / "tiny_labels_3")
  assert found.manifest.records == LABELS
  entries = student.data.train
  assert entries.caption.weight == 0.5
  assert entries.distilled_caption.weight == 0.5
  assert entries.distilled_caption.options.path == found.options["path"]
  difference = workdir_lib.diff(base, workdir_lib.to_json(student))
  assert {key.rsplit(".", 1)[0] for key in difference} == {
    "data.train.caption",
    "data.train",
  }


def test_a_second_start_trains_and_measures_nothing(
  finished, tmp_path, monkeypatch
):
  def fail(*args: Any) -> None:
    raise AssertionError(args)

  monkeypatch.setattr(twins_runs, "train", fail)
  monkeypatch.setattr(twins_runs.Twins, "measure", fail)
  results = finished.copy_results(tmp_path)
  before = results.read_bytes()
  start(finished.folder, *KINDS, results=results)
  assert results.read_bytes() == before


def test_a_line_that_was_cut_off_is_measured_again(
  finished, tmp_path, monkeypatch
):
  results = finished.copy_results(tmp_path)
  before = results.read_bytes()
  results.write_bytes(before[:-40])
  measured = []

  def measure(self: twins_runs.Twins, kind: str, seed: int) -> dict[str, Any]:
    measured.append(kind)
    return finished.rows[self.name, kind, seed]

  monkeypatch.setattr(twins_runs.Twins, "measure", measure)
  start(finished.folder, *KINDS, results=results)
  assert measured == ["distilled"]
  assert results.read_bytes() == before


def test_unfinished_runs_are_passed_over(tmp_path, trainer, capsys):
  trainer(STUDY.config(), tmp_path / "runs" / "tiny_nar_0")
  start(tmp_path, "ar", "distilled", seeds=[0], trains=False)
  assert not (tmp_path / "results.jsonl").exists()
  output = capsys.readouterr().out
  assert output.count("tiny_ar_0 is not finished, passed over") == 2
  assert list(trainer.trained) == ["tiny_nar_0"]


def test_unfinished_runs_resume(tmp_path, trainer, monkeypatch):
  """A run whose last checkpoint is not the last step is trained on."""
  config = STUDY.config()
  folder = tmp_path / "tiny_nar_0"
  trainer(config, folder)
  assert twins_runs._is_finished(folder, config)
  shutil.move(folder / "checkpoints" / "1000", folder / "checkpoints" / "900")
  assert not twins_runs._is_finished(folder, config)


def test_folder_of_another_run(tmp_path, trainer):
  config = STUDY.config()
  config.optimizer.learning_rate = 0.5
  trainer(config, tmp_path / "runs" / "tiny_nar_3")
  with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.5 -> 0.001"):
    start(tmp_path, "nar")


def test_studies_match_their_configs():
  for study in twins_runs.STUDIES.values():
    config = study.config()
    entries = config.data.train
    assert entries[study.questions].task == "vqa"
    if study.captions:
      assert entries[study.captions].task == "caption"
    tasks = [entry.task for entry in config.data.evaluation.values()]
    assert sorted(study.tasks) == sorted(tasks)


def test_constraints_where_the_task_has_answers(tmp_path):
  path = tmp_path / "answers.txt"
  path.write_text("yes\nno\n")
  experiment, _ = tiny_run.tiny_model()
  changed = with_answers(experiment, path)
  assert len(changed.tasks["vqa"].candidates() or []) == 2
  assert changed.config.tasks.vqa.answers == str(path)
  assert experiment.config.tasks.vqa.answers == ""
  ways = dict(twins_runs.ways_to_decode(changed))
  assert ways["constrained"]["caption"] == Decoding()
  assert ways["beam"]["caption"] == Decoding("beam")
  for task in ("vqa", "grounding", "entailment"):
    assert ways["constrained"][task] == Decoding(constrained=True)
    assert ways["beam"][task] == Decoding("beam", constrained=True)


def row(kind: str, seed: int, **scores: tuple[float, float]) -> dict[str, Any]:
  """A made-up result: way to decode -> on validation, on test."""
  results = {
    split: {way: {"vqa": {"accuracy": x[i]}} for way, x in scores.items()}
    for i, split in enumerate(("validation", "test"))
  }
  facts = {"steps": 10, "batch_size": 4, "device": "1 x cpu", "jax": "0"}
  facts["date"] = "2026-01-01"
  return {"data": "d", "kind": kind, "seed": seed, **facts, "results": results}


def table_of(rows: list[dict[str, Any]]) -> list[list[str]]:
  text = twins_table.format_table(
    {twins_table.key_of(x): x for x in rows}, {"d": ["vqa"]}, {"d": ["test"]}
  )
  lines = [line for line in text.splitlines() if line.startswith("|")]
  return [line.strip("| ").split(" | ") for line in lines]


def test_table_of_invented_results():
  heading, rule, line = table_of(
    [
      row("ar", 0, greedy=(0.5, 0.91), reference=(0.9, 0.80)),
      row("ar", 1, greedy=(0.5, 0.93), reference=(0.9, 0.90)),
      # Best on test is not what counts, and of equal ones the first does.
      row("nar", 0, greedy=(0.6, 0.99), constrained=(0.7, 0.79), beam=(0.7, 1)),
      row("nar", 1, greedy=(0.7, 0.99), constrained=(0.7, 0.92), beam=(0.7, 1)),
      row("distilled", 1, greedy=(0.5, 0.85)),
    ]
  )
  assert heading[2:5] == ["AR", "NAR", "NAR distilled"]
  assert set(rule) == {"---"}
  assert line == [
    "d, test",
    "vqa, accuracy",
    "85.0 (80.0..90.0) reference",
    "85.5 (79.0..92.0) constrained",
    "85.0 (85.0..85.0) greedy",
    "+0.5 (-1.0..+2.0)",
    # Of the seed that both have.
    "-5.0 (-5.0..-5.0)",
    "2 / 2 / 1",
  ]


def test_missing_results_are_not_measured():
  _, _, line = table_of([row("nar", 0, greedy=(0.5, 0.5))])
  assert line[2] == line[4] == line[5] == line[6] == "not measured"
  assert line[3] == "50.0 (50.0..50.0) greedy"
  assert line[7] == "0 / 1 / 0"
  assert set(table_of([])[2][2:7]) == {"not measured"}


def test_results_file(tmp_path):
  path = tmp_path / "folder" / "results.jsonl"
  assert twins_table.read_rows(path) == {}
  first, second = row("ar", 0, greedy=(0, 0)), row("ar", 1, greedy=(0, 0))
  twins_table.append_row(path, first)
  twins_table.append_row(path, first)
  with path.open("a") as file:
    file.write('{"data": "d", "ki')
  assert twins_table.read_rows(path) == {("d", "ar", 0): first}
  twins_table.append_row(path, second)
  assert list(twins_table.read_rows(path).values()) == [first, second]
  with path.open("a") as file:
    file.write('{"data": "d"}\n')
  with pytest.raises(UserError, match=r'line 3 of ".*" is not a result.*kind'):
    twins_table.read_rows(path)


@pytest.mark.parametrize(
  ("flag", "texts", "message"),
  [
    ("data", ["shaps"], r'--data: no "shaps". Did you mean "shapes"'),
    ("kinds", ["distiled"], r'--kinds: no "distiled". Did .* "distilled"'),
    ("kinds", [], r"--kinds is empty; choose from nar, ar, distilled"),
  ],
)
def test_unknown_names(flag, texts, message):
  known = {"data": list(twins_runs.STUDIES), "kinds": twins._KINDS}
  with pytest.raises(UserError, match=message):
    twins._chosen(flag, texts, known[flag])


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["0", "-1"], r'--seeds: "-1" is not a seed; such as --seeds=0,1'),
    ([], r"--seeds is empty"),
  ],
)
def test_wrong_seeds(texts, message):
  with pytest.raises(UserError, match=message):
    twins._seeds(texts)


def test_answers_for_a_run_without_questions(tmp_path):
  experiment, _ = tiny_run.tiny_model()
  tasks = {"caption": experiment.tasks["caption"]}
  changed = dataclasses.replace(experiment, tasks=tasks)
  with pytest.raises(UserError, match=r"for vqa, on which.*tasks: caption"):
    with_answers(changed, tmp_path / "answers.txt")


def test_command_ends_in_one_line(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.benchmarks.twins"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert len(result.stderr.splitlines()) == 1
  assert "--runs is missing" in result.stderr
