"""`config.json` and vocabulary are compared with the checkpoint."""

import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

from narvl_jax.checkpointing import digests, integrity, overview
from narvl_jax.checkpointing.record import read_record
from narvl_jax.checkpointing.record_checks import check_config
from narvl_jax.checkpointing.runs import build_in, load_run
from narvl_jax.checkpointing.weights import opened
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.evaluate import Options as EvaluateOptions
from narvl_jax.evaluate import evaluate
from narvl_jax.evaluation.labelling import Labeller
from narvl_jax.experiment.config import from_json
from narvl_jax.interop.run_folder import read_run
from narvl_jax.predict import predict
from narvl_jax.prediction.request import Request
from narvl_jax.run.start import restore_or_init
from tests.evaluation import tiny_run


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
  """A run whose checkpoint contains its config, as after `train`."""
  run = tiny_run.copy_run(tmp_path / "run")
  folder = run / "checkpoints" / str(tiny_run.STEP)
  config = json.loads((run / "config.json").read_text())
  record = read_record(folder)
  digests.replace_record(folder, record._replace(config=config))
  assert integrity.examine(folder) is None
  return run


def _edit(run: pathlib.Path, key: str, value: Any) -> None:
  path = run / "config.json"
  config = section = json.loads(path.read_text())
  *sections, last = key.split(".")
  for name in sections:
    section = section[name]
  section[last] = value
  path.write_text(json.dumps(config))


def test_the_same_config_is_used_without_a_word(run, capsys):
  assert predict(run, Request(task="vqa", example=0))["step"] == tiny_run.STEP
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
  ("key", "value", "seen"),
  [
    ("data.image_size", [64, 64], r"\(64, 64\) there and \(32, 32\) in the"),
    ("optimizer.ema_decay", 0.9, "0.9 there and 0.0 in the"),
    ("tasks.vqa.eos", False, "False there and True in the"),
    ("evaluation.mask_specials", False, "False there and True in the"),
    ("model.num_queries", 9, "9 there and 8 in the"),
    ("data.max_text_length", 30, "30 there and 40 in the"),
    ("data.max_label_length", 30, "30 there and 20 in the"),
    ("seed", 3, "3 there and 0 in the"),
  ],
)
def test_an_edited_config_is_rejected(run, key, value, seen):
  _edit(run, key, value)
  message = (
    rf"run/config.json is not what the checkpoint of step {tiny_run.STEP} was"
    rf" trained with: {key} is {seen} checkpoint; write it again: python -m"
    rf" narvl_jax.checkpoints restore_config {run}"
  )
  for read in (
    lambda: predict(run, Request(task="vqa", example=0)),
    lambda: evaluate(run, EvaluateOptions(max_examples=2)),
    lambda: load_run(run, tiny_run.STEP),
    lambda: Labeller(run),
    lambda: read_run(run),
    lambda: opened(str(run), "init_from").__enter__(),
  ):
    with pytest.raises(UserError, match=message) as error:
      read()
    assert "\n" not in str(error.value)
  assert not (run / "evaluations").exists()
  assert overview.restore_config(run).splitlines() == [
    f"kept {run / 'config.json.old'}",
    f"wrote {run / 'config.json'}, as step {tiny_run.STEP} was trained with it",
  ]
  load_run(run)


def test_settings_without_effect_on_answers_are_reported(run, capsys):
  """For example the location of data on another machine."""
  _edit(run, "mesh.fsdp", 2)
  _edit(run, "data.num_workers", 3)
  load_run(run)
  assert capsys.readouterr().err == ""
  _edit(run, "data.evaluation.vqa.options", {"image_size": 32, "path": "/b"})
  _edit(run, "evaluation.batch_size", 4)
  load_run(run)
  (line,) = capsys.readouterr().err.splitlines()
  assert line == (
    f"note: {run / 'config.json'} differs from the config of the checkpoint of"
    f" step {tiny_run.STEP}: data.evaluation.vqa.options.path is /b there"
    " and (absent) in the checkpoint; evaluation.batch_size is 4 there and 16"
    " in the checkpoint"
  )


def test_settings_that_came_later_do_not_differ(run):
  folder = run / "checkpoints" / str(tiny_run.STEP)
  record = read_record(folder)
  del record.config["optimizer"]["ema_warmup"]
  config = from_json(json.loads((run / "config.json").read_text()))
  assert check_config(run, config, record) == []


@pytest.mark.parametrize("key", ["train.steps", "data.image_size"])
def test_a_run_is_not_resumed_with_another_config(run, key):
  """`config.json` and the flags agree, but the checkpoint differs."""
  config = from_json(json.loads((run / "config.json").read_text()))
  section, name = key.split(".")
  del config[section][name]
  config[section][name] = 7
  setup: Any = SimpleNamespace(
    experiment=SimpleNamespace(config=config),
    abstract_state={},
    shardings={},
  )
  said: Any = []
  with (
    Checkpoints(run, keep_last=2) as checkpoints,
    pytest.raises(UserError, match=rf"{key} is 7 there and .* in the check"),
  ):
    restore_or_init(setup, checkpoints, said.append)
  assert said == []


@pytest.mark.parametrize(
  ("text", "reason"),
  [
    ("", r"cannot be read \(Expecting value"),
    ('{"seed": 0', r"cannot be read \(Expecting"),
    ("[]", r"cannot be read \(it is not a JSON object"),
    ("[" * 200_000, r"cannot be read \("),
    ('{"data": 5}', "cannot be used: data=5 is not a section of settings"),
    ('{"tasks": ["vqa"]}', r"cannot be used: tasks=\['vqa'\] is not a section"),
    ('{"tasks": {"vqa": 1}}', "cannot be used: tasks={'vqa': 1} is not a"),
    ('{"data": {"train": {"a": null}}}', "data.train={'a': None} is not a sec"),
    (
      '{"data": {"image_size": 5}}',
      "cannot be used: data.image_size=5 is not of type tuple",
    ),
    (
      '{"optimizer": {"ema_decay": "0.9"}}',
      "cannot be used: optimizer.ema_decay='0.9' is not of type float",
    ),
    ('{"model": {"width": "32"}}', "model.width='32' is not of type int"),
    ('{"seed": null}', "seed=None is not of type int"),
  ],
)
def test_a_damaged_config_names_the_command_to_restore_it(run, text, reason):
  (run / "config.json").write_text(text)
  for read in (
    lambda: predict(run, Request(task="vqa", example=0)),
    lambda: evaluate(run),
    lambda: opened(str(run), "init_from").__enter__(),
  ):
    with pytest.raises(
      UserError,
      match=rf"config.json .*{reason}.*; use another --workdir, or write it"
      rf" again: python -m narvl_jax.checkpoints restore_config {run}$",
    ):
      read()
  overview.restore_config(run)
  load_run(run)
  assert (run / "config.json.old").read_text() == text


def test_a_lost_config_is_restored(run):
  (run / "config.json").unlink()
  with pytest.raises(UserError, match=r"has no run: .*; if it was lost, wri"):
    evaluate(run)
  overview.restore_config(run)
  load_run(run)


def test_no_config_in_any_checkpoint(tmp_path):
  run = tiny_run.copy_run(tmp_path / "run")
  with pytest.raises(UserError, match=r"no checkpoint in .* with a config; re"):
    overview.restore_config(run)


def test_the_vocabulary_of_another_run_is_rejected(run):
  folder = run / "checkpoints" / str(tiny_run.STEP)
  record = read_record(folder)
  own = Vocabulary.load(run / "vocabulary").fingerprint
  digests.replace_record(folder, record._replace(vocabulary=own))
  experiment, _, _ = load_run(run)
  words = ["red", "green", "blue"] * 40
  Vocabulary.train(words, experiment.vocabulary.size, num_bins=16).save(
    run / "vocabulary"
  )
  message = rf"run/vocabulary is not .* step 7 .* is .*, not {own[:12]}; bring"
  with pytest.raises(UserError, match=message):
    load_run(run)
  setup: Any = SimpleNamespace(
    experiment=build_in(experiment.config, run),
    abstract_state={},
    shardings={},
  )
  say: Any = print
  with (
    Checkpoints(run, keep_last=2) as checkpoints,
    pytest.raises(UserError, match=message),
  ):
    restore_or_init(setup, checkpoints, say)


@pytest.mark.parametrize("name", ["vocabulary.json", "tokenizer.json"])
@pytest.mark.parametrize(
  "text", ["", "[]", "5", "{}", '{"base": 5}', "[" * 200_000, "cut"]
)
def test_a_damaged_vocabulary_ends_in_one_line(run, name, text):
  path = run / "vocabulary" / name
  if text == "cut":
    text = path.read_text()[:-20]
  path.write_text(text)
  with pytest.raises(
    UserError,
    match=rf"{run}/vocabulary.*; restore it from a copy of the run",
  ) as error:
    load_run(run)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "key", ["base", "num_codes", "num_bins", "expansions", "fingerprint"]
)
@pytest.mark.parametrize("value", [None, -1, "x", [1], {"a": 1}])
def test_values_of_wrong_types_in_a_vocabulary(run, key, value):
  path = run / "vocabulary" / "vocabulary.json"
  content = json.loads(path.read_text())
  content[key] = value
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"restore it|restore its files"):
    Vocabulary.load(run / "vocabulary")
