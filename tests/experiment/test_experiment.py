"""An experiment from a config, and from a run folder."""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax.linen import meta

from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.configs import shapes
from narvl_jax.data import tasks
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import experiment as experiment_lib
from narvl_jax.experiment import vocabulary as run_vocabulary
from narvl_jax.experiment.config import Config, default_config, train_source
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import DataSets, load_mixture
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.run import data_checks as run_data
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.run_folder.workdir import save_experiment
from tests.evaluation import tiny_run
from tests.support.tiny import tiny_config


@pytest.fixture(scope="module")
def built() -> Experiment:
  return create(tiny_config())


def test_parts_belong_together(built):
  assert set(built.tasks) == {"vqa", "grounding"}
  assert built.model_config.vocab_size == built.vocabulary.size
  assert built.model_config.pad_id == built.vocabulary.pad_id
  assert built.model_config.width == 32
  # What the config leaves out is that of the named size.
  assert built.model_config.resnet_width == 16
  assert built.vocabulary.num_bins == 8
  shapes = meta.unbox(built.abstract_variables())
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shapes))


def test_folder_that_is_saved_can_be_built_again(built, tmp_path):
  folder = tmp_path / "a" / "run"
  save_experiment(folder, built)
  assert workdir_lib.is_run(folder)
  again = build_in(workdir_lib.read_config(folder), folder)
  assert again.model_config == built.model_config
  assert again.vocabulary.size == built.vocabulary.size
  text = "what color is the circle?"
  assert again.vocabulary.encode(text) == built.vocabulary.encode(text)


def test_shapes_without_data_and_files(built, monkeypatch):
  monkeypatch.setattr(Vocabulary, "train", None)
  config = tiny_config()
  # What the training of the vocabulary came to.
  config.vocabulary.size = built.vocabulary.size
  only = create(config, shapes_only=True)
  assert only.model_config == built.model_config
  assert only.vocabulary.blank_id == built.vocabulary.blank_id
  assert only.vocabulary.forbidden.shape == built.vocabulary.forbidden.shape
  assert not only.tasks


def test_vocabulary_of_a_run_is_not_trained_again(built, tmp_path, monkeypatch):
  save_experiment(tmp_path, built)
  monkeypatch.setattr(Vocabulary, "train", None)
  build_in(tiny_config(), tmp_path)


def test_interrupted_save_is_no_run(built, tmp_path, monkeypatch):
  def fail(*_: object) -> None:
    raise OSError("no space left")

  monkeypatch.setattr(workdir_lib, "write_config", fail)
  with pytest.raises(OSError, match="no space left"):
    save_experiment(tmp_path, built)
  assert not workdir_lib.is_run(tmp_path)


def test_types_of_activations():
  assert experiment_lib.compute_dtype("auto") == jnp.float32
  assert experiment_lib.compute_dtype("bfloat16") == jnp.bfloat16


def test_auto_is_bfloat16_on_an_accelerator(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  assert experiment_lib.compute_dtype("auto") == jnp.bfloat16


@pytest.mark.parametrize("source", ["official", "huggingface"])
def test_vocabulary_files_that_are_not_there(source, tmp_path):
  config = tiny_config()
  config.vocabulary.source = source
  config.vocabulary.path = str(tmp_path)
  with pytest.raises(UserError, match=str(tmp_path)):
    run_vocabulary.make_vocabulary(config)


def _mixture(config: Config) -> list[MixtureEntry]:
  return load_mixture(config)


def test_mixture_is_that_of_the_config():
  config = tiny_config()
  config.data.train.vqa.weight = 3.0
  entries: dict[str, Any] = {name: rest for *rest, name in _mixture(config)}
  assert {name: rest[1:] for name, rest in entries.items()} == {
    "grounding": ["grounding", 1.0],
    "vqa": ["vqa", 3.0],
  }
  record = entries["vqa"][0][0]
  assert record.task == "vqa"


def test_queries_and_labels_for_the_shortest_target(built):
  config = tiny_config()
  mixture = _mixture(config)
  run_data.check_targets(built, mixture)
  small = dataclasses.replace
  few = small(built, model_config=small(built.model_config, num_queries=4))
  with pytest.raises(
    UserError, match=r'num_queries is 4, .*"grounding" needs 5 .*num_queries='
  ):
    run_data.check_targets(few, mixture)
  config.data.max_label_length = 4
  with pytest.raises(
    UserError, match=r'max_label_length=4 is shorter .* of "grounding",.*=5$'
  ):
    run_data.check_targets(small(built, config=config), mixture)


def test_bad_records_do_not_keep_a_run_from_starting(built):
  mixture = _mixture(tiny_config())

  class Damaged:
    def __init__(self, source: Any, good: int) -> None:
      self.source, self.good = source, good

    def __len__(self) -> int:
      return 9

    def __getitem__(self, index: int) -> Any:
      if index < self.good:
        return self.source[index]
      raise ValueError("torn row")

    def locate(self, index: int) -> str:
      return f"a.tsv row {index + 1}"

  def damaged(good: int) -> list[Any]:
    return [
      entry._replace(source=Damaged(entry.source, good)) for entry in mixture
    ]

  assert run_data.check_targets(built, damaged(3)) == []
  with pytest.raises(
    UserError,
    match=r"none of the first 9 records of .* is good: a.tsv row 1: torn row",
  ):
    run_data.check_targets(built, damaged(0))

  def texts(good: int) -> list[str]:
    source, task, *_ = damaged(good)[1]
    return list(tasks.vocabulary_texts(task, {}, source))

  assert texts(0) == []
  assert texts(5) == texts(9)[: len(texts(5))] != []


def test_the_vocabulary_of_bad_records(tmp_path):
  path = tmp_path / "a.tsv"
  label = "x" * 5000
  path.write_text(f"1\t2\tAAAA\ta man sleeps\ta man\t{label}\n" * 3)
  config = default_config("entailment")
  config.data.train.own = train_source("ofa_tsv", "entailment", path=str(path))
  with pytest.raises(
    UserError, match=r"no record of own .*a.tsv row 1: .*xxx.*check_data"
  ) as error:
    run_vocabulary.make_vocabulary(config)
  # Not the whole of what was found there.
  assert len(str(error.value)) < 800


def test_targets_that_are_too_long_are_reported():
  config: Any = shapes.get_config()
  config.model.num_queries = 9  # Two objects; three are 14 labels.
  few = create(config)
  (note,) = run_data.check_targets(few, _mixture(config))
  assert re.fullmatch(
    r"\d+ of 64 targets of caption need more than 9 queries and contribute"
    r" no gradient:"
    r" --config.model.num_queries=14",
    note,
  )


def test_targets_with_too_many_labels_are_bad_before_compilation():
  config: Any = shapes.get_config()
  config.data.max_label_length = 8
  config.model.num_queries = 8
  built = create(config)
  with pytest.raises(
    UserError,
    match=r"\d+ of 64 targets of caption have more than data.max_label_length=8"
    r" labels and are bad records: --config.data.max_label_length=14"
    r" --config.model.num_queries=14; at most data.max_bad_fraction=0.01 of",
  ):
    run_data.check_targets(built, _mixture(config))
  config.data.max_bad_fraction = 0.9
  notes = run_data.check_targets(create(config), _mixture(config))
  # Those that are bad are not reported as without gradient, too.
  (note,) = notes
  assert note.endswith(
    "--config.data.max_label_length=14 --config.model.num_queries=14"
  )


def test_what_is_evaluated_later_is_opened_at_once():
  config = tiny_config()
  run_data.check_evaluation(DataSets(config))
  config.train.eval_split = "validaton"
  with pytest.raises(
    UserError,
    match=r'data.evaluation.\w+ with train.eval_split="validaton": .*'
    r'Did you mean "validation".*\(--config.train.eval_split\)$',
  ):
    run_data.check_evaluation(DataSets(config))
  # Not used then.
  config.train.eval_every = 0
  run_data.check_evaluation(DataSets(config))
  config.data.evaluation.vqa.options.image_sise = 48
  with pytest.raises(UserError, match=r'option "image_sise"'):
    run_data.check_evaluation(DataSets(config))


def test_best_metric_is_of_a_task_that_is_evaluated():
  config = tiny_config()
  config.evaluation.best_metric = "grounding/mean_iou"
  run_data.check_evaluation(DataSets(config))
  del config.data.evaluation["grounding"]
  with pytest.raises(UserError, match=r"grounding/mean_iou.* is not measured"):
    run_data.check_evaluation(DataSets(config))


def test_restored_variables_are_on_one_device():
  experiment, variables, step = load_run(tiny_run.tiny_run())
  assert step == tiny_run.STEP
  shapes = meta.unbox(experiment.abstract_variables())["params"]
  found = jax.tree.map(lambda x: (x.shape, x.dtype), variables["params"])
  assert found == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
  for leaf in jax.tree.leaves(variables):
    assert leaf.devices() == {jax.devices()[0]}


def test_restoring_what_is_not_there(tmp_path):
  with pytest.raises(UserError, match=r"nowhere has no run: there is no"):
    load_run(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r'no checkpoint "5"; this run has 7'):
    load_run(tiny_run.tiny_run(), 5)


def test_restoring_a_damaged_config(tmp_path: pathlib.Path):
  (tmp_path / "config.json").write_text(json.dumps({"seed": "x"}))
  with pytest.raises(UserError, match=r"seed='x' is not of type int"):
    load_run(tmp_path)
