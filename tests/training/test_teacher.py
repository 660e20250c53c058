"""A student's run with a teacher: what fits, and the compiled step."""

import functools
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.data.answers import load_answers
from narvl_jax.data.batches.pipeline import Batcher
from narvl_jax.data.example import TASKS
from narvl_jax.errors import UserError
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import load_mixture
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import make_mesh, shard_batch
from narvl_jax.run.announce import describe_model
from narvl_jax.run.data_checks import check_answers
from narvl_jax.run_folder.workdir import read_config, write_config
from narvl_jax.state.parameters import flatten
from narvl_jax.training.constrained import answer_constraints
from narvl_jax.training.setup import Setup, build_setup
from narvl_jax.training.teacher import find_teacher
from tests.evaluation.tiny_run import tiny_config, tiny_run
from tests.support.twin import twin_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of a teacher; do not write into it."""
  target = tmp_path_factory.mktemp("teacher") / "run"
  # Another padding of the table than the student has.
  twin_of(tiny_run(), target, model__vocab_multiple=1)
  return target


def student(
  teacher: Any, *, shapes_only: bool = False, **settings: Any
) -> Experiment:
  config: Any = tiny_config().copy_and_resolve_references()
  config.train.batch_size = 4
  config.distillation.teacher = str(teacher)
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in settings.items()}
  )
  validate(config)
  if shapes_only:
    return create(config, shapes_only=True)
  return build_in(config, tiny_run())


def batch_of(run: Setup) -> dict[str, jax.Array]:
  """Returns a record of every task."""
  experiment = run.experiment
  data = experiment.config.data
  batcher = Batcher(
    image_size=tuple(data.image_size),
    max_text_length=data.max_text_length,
    max_label_length=experiment.label_length,
  )
  rows = batcher.empty(4)
  mixture = load_mixture(experiment.config)
  for row, (source, name, _, _) in enumerate(mixture):
    batcher.write(rows, row, source[row], experiment.tasks[name])
  arrays = {name: rows[name] for name in run.batch}
  return shard_batch(arrays, run.mesh)


def test_a_step_with_a_teacher(folder: pathlib.Path) -> None:
  run = build_setup(student(folder), make_mesh(1))
  teacher = run.teacher
  assert teacher is not None
  variables = teacher.read()
  stored = load_run(folder)[1]
  for name, value in flatten(stored).items():
    np.testing.assert_array_equal(flatten(variables)[name], value)
  compiled = run.compile_step()
  # Arguments, not constants of the program.
  memory: Any = compiled.memory_analysis()
  size = memory.argument_size_in_bytes
  assert size >= run.state_bytes_per_device + teacher.bytes_per_device
  inputs = run.read_inputs()
  step = functools.partial(compiled, inputs)
  state = run.init(jax.random.key(0))
  _, metrics = step(state, batch_of(run))
  assert np.isfinite(metrics["loss"])
  assert float(metrics["distillation"]) > 0
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(inputs))
  alone = build_setup(student(""), make_mesh(1))
  assert run.step_flops() > 1.3 * alone.step_flops()


def test_what_is_said_of_it(folder: pathlib.Path) -> None:
  run = build_setup(student(folder), make_mesh(1))
  said: list[str] = []
  say: Any = said.append
  describe_model(run, say)
  assert re.match(
    rf"teacher {folder}, step 0: [\d,]+ parameters, .*B per device", said[1]
  )


def test_no_weight_is_no_teacher(folder: pathlib.Path) -> None:
  programs = []
  for teacher in ("", folder):
    experiment = student(teacher, distillation__weight=0.0)
    run = build_setup(experiment, make_mesh(1))
    assert run.teacher is None
    programs.append(run.trace_step().lower().as_text())
  assert programs[0] == programs[1]


def shapes_of_teacher(**settings: Any) -> Any:
  return find_teacher(student(**settings), make_mesh(1))


def test_a_vocabulary_that_only_has_a_size(folder: pathlib.Path) -> None:
  """As when a step is compiled for devices that are not there."""
  found = shapes_of_teacher(teacher=folder, shapes_only=True)
  assert found is not None


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
  "parallel": (
    {"model__decoder": None},
    {},
    r"answers in parallel \(model.decoder=parallel\).*decoder=autoregressive",
  ),
  "tasks": (
    {"tasks": ("vqa", "caption")},
    {},
    r"was trained on caption, vqa and not on entailment, grounding; leave",
  ),
  "pictures": (
    {},
    {"data__image_size": (48, 32)},
    r"pictures of \(32, 32\) pixels, this run of \(48, 32\):"
    r" --config.data.image_size='\(32, 32\)'",
  ),
  "positions": (
    {},
    {"data__max_text_length": 60, "model__max_text_positions": 100},
    r"has 64 text positions and would need 78 .*data.max_text_length=46",
  ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_teachers_that_do_not_fit(
  folder: pathlib.Path, tmp_path: pathlib.Path, mistake: str
) -> None:
  theirs, ours, message = MISTAKES[mistake]
  copy = shutil.copytree(folder, tmp_path / "copy")
  config: Any = read_config(copy)
  tasks = theirs.get("tasks")
  if tasks:
    for section in (config.data.train, config.data.evaluation, config.tasks):
      for name in list(section):
        if name not in tasks:
          del section[name]
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in theirs.items() if k != "tasks"}
  )
  write_config(copy, config)
  with pytest.raises(UserError, match=message) as error:
    shapes_of_teacher(teacher=copy, **ours)
  assert "\n" not in str(error.value)
  assert "--config.distillation.teacher" in str(error.value)


def test_folders_that_are_no_teacher(
  folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  with pytest.raises(
    UserError, match=r'distillation.teacher="\S+none": there is no such folder'
  ):
    shapes_of_teacher(teacher=tmp_path / "none")
  copy = shutil.copytree(folder, tmp_path / "copy")
  shutil.rmtree(copy / "vocabulary")
  with pytest.raises(UserError, match=r"has no vocabulary; .*--vocabulary"):
    shapes_of_teacher(teacher=copy)
  experiment = student(folder)
  words: Any = experiment.vocabulary
  words._symbols = (*words._symbols[:-1], "changed")
  del words.__dict__["fingerprint"]
  with pytest.raises(
    UserError, match=r"another vocabulary \(\w+, .*source=run"
  ):
    find_teacher(experiment, make_mesh(1))


def test_the_vocabulary_of_a_run(tmp_path: pathlib.Path) -> None:
  config: Any = tiny_config().copy_and_resolve_references()
  config.vocabulary.update({"source": "run", "path": str(tiny_run())})
  expected = build_in(tiny_config(), tiny_run()).vocabulary
  for shapes_only in (False, True):
    experiment = create(config, shapes_only=shapes_only)
    assert experiment.vocabulary.fingerprint == expected.fingerprint
  config.vocabulary.path = str(tmp_path)
  with pytest.raises(UserError, match=r"has no vocabulary; .*source=run it m"):
    create(config)
  config.vocabulary.path = ""
  with pytest.raises(UserError, match=r'vocabulary.path="" has no vocabulary'):
    create(config)


def test_only_parallel_models_have_a_teacher(folder: pathlib.Path) -> None:
  with pytest.raises(UserError, match=r"is for parallel models; .*\.distill"):
    student(folder, model__decoder="autoregressive")
  with pytest.raises(UserError, match=r"weight=1.5 must be at least 0, at mo"):
    student(folder, distillation__weight=1.5)


@pytest.fixture
def constrained(tmp_path: pathlib.Path) -> Callable[..., Any]:
  """Returns a function that builds a run with these answers of VQA."""

  def build(*answers: str, **settings: Any) -> Experiment:
    path = tmp_path / "answers.txt"
    path.write_text("".join(f"{answer}\n" for answer in answers))
    assert load_answers(path)
    return student(
      "",
      **{
        "loss__constrained": True,
        "model__decoder": "autoregressive",
        "tasks__vqa__answers": str(path),
        **settings,
      },
    )

  return build


def test_lists_of_answers_constrain(constrained: Callable[..., Any]) -> None:
  experiment = constrained("red", "two")
  found = answer_constraints(experiment)
  names = [TASKS[index] for index in sorted(found)]
  assert sorted(names) == ["entailment", "vqa"]
  encode = experiment.vocabulary.encode
  vqa = found[TASKS.index("vqa")]
  assert set(vqa.token.tolist()) == {*encode(" red"), *encode(" two")}
  assert not answer_constraints(constrained("red", loss__constrained=False))


def test_targets_outside_of_the_list(constrained: Callable[..., Any]) -> None:
  experiment = constrained("red")
  mixture = load_mixture(experiment.config)
  with pytest.raises(
    UserError, match=r"of data.train.vqa is not among the 1 answers of vqa, .*"
  ):
    check_answers(experiment, mixture)
  # Those of entailment are known.
  check_answers(experiment, [x for x in mixture if x[1] != "vqa"])


def test_parallel_models_know_no_constraint(
  constrained: Callable[..., Any],
) -> None:
  with pytest.raises(UserError, match=r"is for autoregressive models; .*False"):
    constrained("red", model__decoder="parallel")
