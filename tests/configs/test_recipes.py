"""The recipes of the official scripts: settings, lengths, data, arguments."""

import importlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from absl import flags
from flax.linen import meta
from ml_collections.config_flags import config_flags

from narvl_jax.configs.official import SIZES, Recipe
from narvl_jax.data.sources import load_source
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import default_config, to_json
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import DataSets, load_mixture, set_epoch
from narvl_jax.models import model_config
from narvl_jax.run import data_checks as run_data
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.parameters import assign_rules, flatten
from narvl_jax.training.optimizer import make_schedule
from tests.conftest import ROOT
from tests.data.sources import tsv_files

# Splits of the official files; the first is trained on.
SPLITS = {
  "refcoco": ("train", "val", "testA", "testB"),
  "refcocoplus": ("train", "val", "testA", "testB"),
  "refcocog": ("train", "val", "test"),
  "vqa": ("train", "val", "test"),
  "snli_ve": ("train", "dev", "test"),
  "caption": ("stage1_train", "val", "test"),
}
# The official scripts: rate, epochs, warm-up in per cent, global batch,
# smoothing, drop path, queries, pixels, embeddings frozen, moving averages.
SCRIPTS = {
  "caption:huge": (1e-5, 5, 6, 128, 0.1, 0.1, 20, 480, True, 0.0),
  "vqa:base": (5e-5, 10, 4, 512, 0.1, 0.1, 6, 480, True, 0.9999),
  "vqa:huge": (5e-5, 10, 0, 512, 0.1, 0.1, 6, 480, True, 0.9999),
  "refcoco:tiny": (5e-5, 50, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcoco:base": (5e-5, 10, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcoco:large": (3e-5, 10, 6, 128, 0.1, 0.2, 5, 512, False, 0.0),
  "refcoco:huge": (3e-5, 10, 6, 128, 0.1, 0.2, 5, 512, False, 0.0),
  "refcocoplus:tiny": (5e-5, 50, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcocoplus:base": (5e-5, 10, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcocoplus:huge": (3e-5, 10, 6, 128, 0.1, 0.2, 5, 512, False, 0.0),
  "refcocog:tiny": (3e-5, 50, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcocog:base": (5e-5, 12, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "refcocog:huge": (3e-5, 15, 6, 128, 0.1, 0.1, 5, 512, False, 0.0),
  "snli_ve:base": (5e-5, 5, 6, 256, 0.0, 0.1, 3, 480, False, 0.0),
  "snli_ve:huge": (2e-5, 6, 6, 256, 0.0, 0.2, 3, 480, False, 0.0),
}
ROWS = 300


@pytest.fixture(autouse=True)
def without_data(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
  """Runs in a folder without `data`."""
  monkeypatch.chdir(tmp_path)


def _module(name: str) -> Any:
  return importlib.import_module(f"narvl_jax.configs.{name}")


def _config(name: str, arg: str = "") -> Any:
  return _module(name).get_config(arg)


def _started(config: Any) -> Any:
  """Returns the config as it is once a run starts."""
  set_epoch(DataSets(config))
  return config


def _write_data(folder: pathlib.Path, name: str) -> str:
  """Writes the files of a data set; returns the argument that names them."""
  task = _module(name).DATASET.task
  for split in SPLITS[name]:
    changes: dict[int, str | bytes] = {}
    if split == "stage1_train":
      changes[2] = "a dog."
    count = ROWS if "train" in split else 3
    rows = (tsv_files.row(task, i, changes) for i in range(count))
    tsv_files.write(folder / f"{name}_{split}.tsv", rows)
  return f"data={folder}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPLITS)
def test_model_is_the_official_one(name: str, size: str):
  config = _config(name, f"size={size}")
  experiment = create(config, shapes_only=True)
  assert experiment.vocabulary.size == 59458
  official = model_config(size)
  for field in ("width", "mlp_width", "encoder_layers", "decoder_layers"):
    assert getattr(experiment.model_config, field) == getattr(official, field)
  params = flatten(meta.unbox(experiment.abstract_variables())["params"])
  queries = (config.model.num_queries, official.width)
  assert params["decoder/query_embed"].shape == queries
  rules = assign_rules(config.optimizer.rules, list(params))
  frozen = {path for path, rule in rules.items() if rule.freeze}
  freezes = name in ("vqa", "caption")
  assert frozen == ({"embed_tokens"} if freezes else set())


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_of_official_scripts(script: str):
  name, size = script.split(":")
  config = _config(name, size)
  rate, epochs, warmup, batch, smoothing, drop, queries, side, frozen, ema = (
    SCRIPTS[script]
  )
  optimizer = config.optimizer
  assert config.model.size == size
  assert optimizer.learning_rate == rate
  assert config.train.batch_size == batch
  rows = 64 if size in ("large", "huge") else 128
  assert batch / config.train.accumulation_steps == rows
  assert config.loss.label_smoothing == smoothing
  assert config.model.encoder_drop_path == drop
  assert config.model.decoder_drop_path == drop
  assert config.model.num_queries == queries
  assert config.data.image_size == (side, side)
  assert optimizer.ema_decay == ema
  assert not (ema and optimizer.ema_warmup)
  assert (len(optimizer.rules) == 2) == frozen
  rows = _module(name).DATASET.train_rows
  steps = epochs * -(-rows // batch)
  assert config.train.steps == steps
  assert optimizer.warmup_steps == steps * warmup // 100
  assert config.seed == (2 if script == "refcoco:base" else 1)


@pytest.mark.parametrize("name", SPLITS)
def test_settings_of_all_official_scripts(name: str):
  config = _config(name)
  optimizer = config.optimizer
  assert (optimizer.name, optimizer.schedule) == ("adamw", "linear")
  assert (optimizer.b1, optimizer.b2) == (0.9, 0.999)
  assert (optimizer.eps, optimizer.weight_decay) == (1e-8, 0.01)
  assert optimizer.eps_placement == "official"
  assert optimizer.clip_norm == 1.0
  assert all(not rule.get("decay", 0) for _, rule in optimizer.rules)
  assert config.model.dropout == 0.1
  assert config.loss.confidence == "temper"
  (task,) = config.tasks.values()
  assert task.eos is True
  assert task.merge_repeats == (name in ("vqa", "caption"))


def test_rate_is_that_of_the_official_schedule():
  config = _config("refcoco")
  optimizer, total = config.optimizer, config.train.steps
  schedule: Any = make_schedule(
    learning_rate=optimizer.learning_rate,
    schedule=optimizer.schedule,
    warmup_steps=optimizer.warmup_steps,
    steps=total,
  )
  warmup = int(0.06 * total)
  for n in (0, 1, warmup, warmup + 1, total // 2, total - 1):
    wanted = 5e-5 * (
      n / warmup if n <= warmup else 1 - (n - warmup) / (total - warmup)
    )
    assert float(schedule(n)) == pytest.approx(wanted, rel=1e-5, abs=1e-10)


def test_huge_vqa_keeps_its_rate():
  optimizer = _config("vqa", "huge").optimizer
  assert (optimizer.schedule, optimizer.warmup_steps) == ("constant", 0)


def test_updates_follow_from_the_rows_of_the_file(tmp_path: pathlib.Path):
  data = _write_data(tmp_path, "refcoco")
  config = _started(_config("refcoco", f"size=tiny,{data}"))
  # 300 rows are two batches of 128 and one that is not full.
  assert config.train.steps == 50 * 3
  assert config.train.eval_every == 3
  assert config.optimizer.warmup_steps == 9
  config = _started(_config("refcoco", f"base,epochs=7,{data}"))
  assert config.train.steps == 7 * 3
  # The default config does not count.
  assert _started(default_config("vqa")).train.epoch_examples == 0


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_updates_follow_the_batch_size(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
  data = _write_data(tmp_path, "refcoco")
  file = f"--config={ROOT / 'configs' / 'refcoco.py'}:epochs=10,{data}"

  def with_flag(flag: str) -> Any:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    # Where config_flags looks for the keys that are overridden.
    monkeypatch.setattr("sys.argv", ["program", file, flag])
    values(["program", file, flag])
    return _started(values.config)

  config = with_flag("--config.train.batch_size=64")
  assert (config.train.eval_every, config.train.steps) == (5, 50)
  assert config.optimizer.warmup_steps == 3
  config = with_flag("--config.train.steps=1000")
  assert (config.train.steps, config.optimizer.warmup_steps) == (1000, 60)
  config = with_flag("--config.optimizer.warmup_steps=4")
  assert (config.train.steps, config.optimizer.warmup_steps) == (30, 4)
  # What a run folder keeps.
  kept = to_json(config)
  assert kept["train"]["steps"] == 30
  assert kept["train"]["epoch_examples"] == ROWS


def test_a_run_from_before_epochs_were_recorded_resumes(
  tmp_path: pathlib.Path,
):
  data = _write_data(tmp_path, "refcoco")
  config = _started(_config("refcoco", data))
  recorded = to_json(config)
  del recorded["train"]["epoch_examples"]
  del recorded["optimizer"]["eps_placement"]
  (tmp_path / "run").mkdir()
  path = tmp_path / "run" / "config.json"
  path.write_text(json.dumps(recorded))
  assert workdir_lib.check(path.parent, config)
  recorded["train"]["steps"] += 1
  path.write_text(json.dumps(recorded))
  with pytest.raises(UserError, match=r"another config: train.steps: "):
    workdir_lib.check(path.parent, config)


def test_split_names_another_training_file(tmp_path: pathlib.Path):
  data = _write_data(tmp_path, "caption")
  rows = (tsv_files.row("caption", i) for i in range(129))
  tsv_files.write(tmp_path / "caption_teacher.tsv", rows)
  config = _started(_config("caption", f"split=teacher,{data}"))
  assert config.train.steps == 5 * 2
  assert config.data.train.caption.split == "teacher"
  ((source, _, _, _),) = load_mixture(config)
  assert len(source) == 129
  assert config.train.eval_split == "val"


@pytest.mark.parametrize("name", SPLITS)
def test_a_run_finds_its_files(
  name: str, tmp_path: pathlib.Path, shared_files: pathlib.Path
):
  config = _config(name, f"size=tiny,{_write_data(tmp_path, name)}")
  config.vocabulary.path = str(shared_files / "bpe")
  experiment = create(config)
  mixture = load_mixture(config)
  assert [len(entry[0]) for entry in mixture] == [ROWS]
  run_data.make_mixture(config, mixture)
  assert run_data.check_targets(experiment, mixture) == []
  run_data.check_evaluation(DataSets(config))
  (task,) = experiment.tasks.values()
  longest = max(len(task.encode(record).text_ids) for record in mixture[0][0])
  assert longest <= config.data.max_text_length


def test_missing_files_name_the_folder_that_was_given(tmp_path: pathlib.Path):
  config = _config("refcoco", f"data={tmp_path / 'no'}")
  hint = r"or --config=FILE.py:data=FOLDER for the folder of refcoco_\*\.tsv\)$"
  with pytest.raises(
    UserError,
    match=r'^data\.train\.refcoco: ofa_tsv: there is no file ".*/no/refcoco_tr'
    r'ain.tsv" .* no folder ".*/no" either\. \(--config\.data\.train\.refcoco, '
    + hint,
  ):
    load_mixture(config)
  with pytest.raises(UserError, match=r"^data\.evaluation\.refcoco .*" + hint):
    run_data.check_evaluation(DataSets(config))


@pytest.mark.parametrize("name", SPLITS)
def test_every_official_split_can_be_evaluated(
  name: str, tmp_path: pathlib.Path
):
  config = _config(name, _write_data(tmp_path, name))
  (entry,) = config.data.evaluation.values()
  options = dict(entry.options)
  for split in SPLITS[name][1:]:
    source = load_source(entry.source, task=entry.task, split=split, **options)
    assert len(source) == 3
  # Captions are grouped by picture.
  wanted = "im2" if name == "caption" else "2"
  assert source[2].id == wanted


@pytest.mark.parametrize("name", SPLITS)
def test_docstrings_match_the_configs(name: str):
  module = _module(name)
  document = module.__doc__
  assert f"--config=configs/{name}.py:size=" in document
  assert re.search(r"\| this config, any size +\| not measured", document)
  assert re.search(r"\| NARVL.*[\d.]+ / [\d.]+.*\| published", document)
  official = {
    script.split(":")[1] for script in SCRIPTS if f"{name}:" in script
  }
  for size in SIZES if name != "caption" else ():
    (line,) = re.findall(rf"^\| {size} .*$", document, re.MULTILINE)
    assert ("| none: as " in line) == (size not in official)
    if name == "vqa":
      continue
    rate, epochs, drop = re.findall(r"\| ([\de.-]+) +(?=\|)", line)
    assert module.RECIPES[size] == Recipe(
      float(rate), int(epochs), float(drop), seed=module.RECIPES[size].seed
    )


def _resolved(name: str) -> str:
  """Returns the config of base, and how those of other sizes differ."""
  base = to_json(_config(name))
  text = [json.dumps(base, indent=1, sort_keys=True)]

  def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
      inner = isinstance(value, dict)
      path = f"{prefix}{key}"
      flat |= leaves(value, f"{path}.") if inner else {path: value}
    return flat

  for size in SIZES:
    text.append(f"\n{size}:")
    other, same = leaves(to_json(_config(name, size))), leaves(base)
    text += [
      f"  {key} = {json.dumps(value)}"
      for key, value in sorted(other.items())
      if value != same.get(key)
    ]
  return "\n".join(text) + "\n"


@pytest.mark.parametrize("name", SPLITS)
def test_resolved_configs(name: str, golden: Callable[[str, str], None]):
  golden(f"configs/{name}.txt", _resolved(name))


@pytest.mark.parametrize(
  ("arg", "message"),
  [
    ("bse", r'no size "bse". Did you mean "base"\?.*:size=SIZE'),
    ("size=hug", r'no size "hug". Did you mean "huge"\?'),
    ("epoch=3", r'no argument "epoch". Did you mean "epochs"\?'),
    ("epochs=0", r'epochs="0" is not a whole number of at least 1'),
    ("epochs=2.5", r'epochs="2.5" is not a whole number of at least 1'),
    ("base,size=huge", r'"size" is given twice, as "base" and "huge"'),
  ],
)
def test_arguments_that_are_wrong(arg: str, message: str):
  with pytest.raises(UserError, match=rf"configs/vqa.py.*{message}"):
    _config("vqa", arg)


def test_files_that_are_not_there(shared_files: pathlib.Path):
  config = _config("refcoco", "data=nowhere")
  with pytest.raises(UserError, match=r'no file "nowhere/refcoco_train.tsv"'):
    load_mixture(config)
  with pytest.raises(UserError, match=r"json.*--config.vocabulary.path"):
    create(config)
