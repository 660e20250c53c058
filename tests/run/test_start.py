"""The state from which a run resumes."""

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from narvl_jax.checkpointing.chosen import choose_step
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.run import start
from narvl_jax.run.run import EVALUATION_DUE, Run
from narvl_jax.run.start import (
  chosen_variables,
  make_up_evaluation,
  restore_or_init,
)
from narvl_jax.run_folder.metrics import MetricsWriter
from narvl_jax.state.train_state import evaluation_variables
from tests.support.saved import (
  assert_equal,
  files_of,
  flip_bit,
  make_state,
  make_target,
  save_run,
)
from tests.support.tiny import tiny_config


def _setup() -> Any:
  """Returns what a resumed run needs of its setup."""
  target = make_target(make_state(1))
  shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
  return SimpleNamespace(abstract_state=target, shardings=shardings)


def _damage(run: pathlib.Path, step: int) -> str:
  """Damages a file of values; returns its name."""
  folder = run / "checkpoints" / str(step)
  name = next(x for x in files_of(folder) if x.startswith("params/d/"))
  flip_bit(folder / name, 8 * 40)
  return name


def _restored(
  checkpoints: Checkpoints,
) -> tuple[int, dict[str, Any], list[str]]:
  """Returns step, run and what was said; checks the values."""
  said: list[str] = []
  say: Any = said.append
  state, step, run = restore_or_init(_setup(), checkpoints, say)
  assert_equal(jax.device_get(state), jax.device_get(make_state(step)))
  return step, run, said


def test_the_newest_is_used(tmp_path):
  save_run(tmp_path)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    step, run, said = _restored(checkpoints)
    assert checkpoints.set_aside == []
  assert (step, run) == (6, {"position": 6})
  assert said == ["resumed from the checkpoint of step 6"]
  assert not (tmp_path / "damaged").exists()


def test_damaged_ones_are_rejected_and_set_aside(tmp_path):
  save_run(tmp_path, (3, 6, 9))
  names = {step: _damage(tmp_path, step) for step in (6, 9)}
  # Something of an earlier time is in the way.
  (tmp_path / "damaged" / "9").mkdir(parents=True)
  with Checkpoints(tmp_path, keep_last=3) as checkpoints:
    step, run, said = _restored(checkpoints)
    assert (step, run) == (3, {"position": 3})
    assert len(checkpoints.set_aside) == 2
    for reported, damaged in zip(said[:2], (9, 6), strict=True):
      assert reported.startswith(
        f"rejected: the checkpoint of step {damaged} is damaged: file"
        f" {names[damaged]} was changed; array "
      )
    assert said[2].startswith("set aside: step 9: file ")
    assert said[2].endswith(f"; now in {tmp_path / 'damaged' / '9.2'}")
    assert said[4:] == ["resumed from the checkpoint of step 3"]
    assert checkpoints.steps() == [3]
    # Which can be saved again.
    checkpoints.save(6, make_state(6))
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6]
  # Nothing was deleted.
  assert (tmp_path / "damaged" / "6" / names[6]).exists()
  assert (tmp_path / "damaged" / "9.2" / names[9]).exists()


def test_without_an_intact_checkpoint_nothing_is_moved(tmp_path):
  save_run(tmp_path)
  for step in (3, 6):
    _damage(tmp_path, step)
  # The same again when the same command is run again.
  for _ in range(2):
    with (
      Checkpoints(tmp_path, keep_last=2) as checkpoints,
      pytest.raises(
        UserError,
        match=r"no checkpoint of this run is intact: step 6: file .* was"
        r" changed.*; step 3: file .*; restore their files, or train",
      ),
    ):
      _restored(checkpoints)
  assert [x.name for x in tmp_path.iterdir()] == ["checkpoints"]


def test_weights_alone_are_no_damage(tmp_path):
  state = make_state(1)
  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    checkpoints.save_variables(
      0, {"params": state.params, "batch_stats": state.batch_stats}
    )
    with pytest.raises(
      UserError, match="contains weights but no state of an opt"
    ):
      _restored(checkpoints)
    assert checkpoints.steps() == [0]


def test_a_stopped_evaluation_is_repeated(tmp_path):
  """Score, metrics and what is kept are those of a run that was not stopped."""
  said: list[str] = []
  say: Any = said.append
  stored = {"position": 3, EVALUATION_DUE: True}

  def save(step: int, **values: Any) -> None:
    checkpoints.save(step, make_state(step), **values)

  with Checkpoints(tmp_path, keep_last=1) as checkpoints:
    save(1, score=0.8)
    save(3, run=stored)
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, {"train/loss": 0.5})
  with (
    Checkpoints(tmp_path, keep_last=1) as checkpoints,
    MetricsWriter(tmp_path, 3) as writer,
  ):
    assert checkpoints.best_step == 1
    state, _, found = restore_or_init(_setup(), checkpoints, say)
    assert found == stored

    def evaluate(state: Any, step: int) -> Any:
      assert int(state.step) == step == 3
      return {"validation/vqa/accuracy": 0.9}, 0.9

    nothing: Any = None
    run = Run(_setup(), nothing, checkpoints, writer, nothing, say)
    make_up_evaluation(run, evaluate, state)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) | {"time": 0} for line in lines] == [
      {"step": 3, "time": 0, "train/loss": 0.5, "validation/vqa/accuracy": 0.9}
    ]
    assert checkpoints.best_step == 3
    assert checkpoints.steps() == [3]
    save(6, score=0.2)
    save(9)
    checkpoints.wait()
  assert said[-1] == "evaluating step 3: its evaluation was stopped"
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [3, 9]
    assert checkpoints.best_step == 3
    assert checkpoints.read_record(3).run == {
      "position": 3,
      EVALUATION_DUE: False,
    }
    assert checkpoints.damage(3) is None


@pytest.mark.parametrize("best", [3, 6])
def test_the_final_report_is_of_the_best_checkpoint(tmp_path, best):
  """As that of `evaluate`, whose rule is `choose_step`."""
  said: list[str] = []
  say: Any = said.append
  state = make_state(6)
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step in (3, 6):
      checkpoints.save(step, make_state(step), score=float(step == best))
    variables, step = chosen_variables(_setup(), state, checkpoints, say)
    assert step == best == choose_step(checkpoints, "best")
  chosen = make_state(best)
  assert_equal(
    jax.device_get(variables), jax.device_get(evaluation_variables(chosen))
  )
  assert said == []


def test_a_damaged_best_checkpoint_does_not_keep_a_run_from_its_end(tmp_path):
  said: list[str] = []
  say: Any = said.append
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    for step, score in ((3, 0.5), (6, 0.4)):
      checkpoints.save(step, make_state(step), score=score)
    checkpoints.wait()
    _damage(tmp_path, 3)
    state = make_state(6)
    _, step = chosen_variables(_setup(), state, checkpoints, say)
  assert step == 6
  assert said[0].startswith("rejected: the checkpoint of step 3 is damaged: ")
  assert (tmp_path / "damaged" / "3").is_dir()


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("tasks.vqa.answers", "no.txt", r'list of answers "no.txt": No such file'),
    ("init_from", "no", r'init_from="no": there is no such folder'),
    ("distillation.teacher", "no", r'teacher="no": there is no such folder'),
    ("data.train.vqa.options.path", "no.jsonl", r'there is no file "no.jsonl"'),
    (
      "data.evaluation.vqa.options.path",
      "no.jsonl",
      r'evaluation.vqa with evaluation.split="test": .* no file "no.jsonl"',
    ),
    ("vocabulary.source", "official", r'path="" has no dict.txt; .*vocab.bpe'),
    ("vocabulary.source", "huggingface", r'path="" has no vocab.json; with'),
    ("vocabulary.source", "run", r'path="" has no vocabulary; .*must be the'),
    ("model.max_text_positions", 12, r"text of 40 tokens exceeds"),
  ],
)
def test_missing_files_are_found_first(
  path, value, message, tmp_path, monkeypatch
):
  """Before a vocabulary is trained, or anything else is expensive."""

  def too_early(*_: Any, **__: Any) -> None:
    raise AssertionError("something expensive began")

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(start, "build_in", too_early)
  config = tiny_config()
  silent: Any = lambda _: None  # noqa: E731
  *sections, key = path.split(".")
  node = config
  for section in sections:
    node = node[section]
  if key == "path":
    where = config.data[sections[1]].vqa
    where.source = "jsonl"
    where.options = ConfigDict()
    node = where.options
  node[key] = value

  def begin(resumes: bool) -> None:
    validate(config)
    start.prepare(DataSets(config), tmp_path / "run", resumes, silent)

  with pytest.raises(UserError, match=message):
    begin(False)
  if path == "init_from":
    # A resumed run does not need them again.
    with pytest.raises(AssertionError, match="something expensive began"):
      begin(True)
