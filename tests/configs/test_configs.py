"""The files in `configs/`: their data fits on their queries and texts."""

import importlib

import pytest

from narvl_jax.configs.common import choose_variant
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.errors import UserError
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.create import create
from narvl_jax.experiment.datasets import DataSets, load_mixture
from narvl_jax.models import ModelConfig, model_config
from narvl_jax.run import data_checks as run_data
from tests.conftest import ROOT

VARIANTS = {"shapes": ("", "quick", "long", "full"), "easy_vqa": ("",)}
RECORDS = 300


def _config(name: str, variant: str):
  return importlib.import_module(f"narvl_jax.configs.{name}").get_config(
    variant
  )


def test_every_file_is_tested():
  files = {path.stem for path in (ROOT / "configs").glob("*.py")}
  # Those of official scripts: test_recipes.py.
  recipes = {"refcoco", "refcocoplus", "refcocog", "vqa", "snli_ve", "caption"}
  shared = {"__init__", "common", "official", "own_data"}
  assert files - shared - recipes == {*VARIANTS, "pod"}


@pytest.mark.parametrize("variant", ["base", "large", "huge"])
def test_pod_has_the_official_sizes(variant: str):
  config = _config("pod", variant)
  validate(config)
  experiment = create(config, shapes_only=True)
  assert experiment.vocabulary.size == 59458
  official = model_config(variant, vocab_size=59458)
  for field in ("width", "encoder_layers", "resnet_blocks", "num_queries"):
    ours = getattr(experiment.model_config, field)
    assert ours == getattr(official, field)
  # Without its files the vocabulary is only good for shapes.
  with pytest.raises(UserError, match=r"json.*--config.vocabulary.path"):
    create(config)


@pytest.mark.parametrize(
  ("name", "variant"),
  [(name, variant) for name in VARIANTS for variant in VARIANTS[name]],
)
def test_records_fit(name: str, variant: str):
  if name == "easy_vqa":
    pytest.importorskip("easy_vqa")
  config = _config(name, variant)
  validate(config)
  experiment = create(config)
  assert isinstance(experiment.model_config, ModelConfig)
  mixture = load_mixture(config)
  run_data.make_mixture(config, mixture)
  run_data.check_evaluation(DataSets(config))
  for source, task, _, _ in mixture:
    for index in range(RECORDS):
      encoded = experiment.tasks[task].encode(source[index])
      assert len(encoded.text_ids) <= config.data.max_text_length
      assert len(encoded.label_ids) <= config.data.max_label_length
      assert required_queries(encoded.label_ids) <= config.model.num_queries
      assert experiment.vocabulary.unk_id not in encoded.text_ids


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_variant(name: str):
  with pytest.raises(UserError, match=r'no variant "lon".*FILE.py:VARIANT'):
    _config(name, "lon")


def test_unknown_variant_names_the_nearest():
  with pytest.raises(UserError, match='Did you mean "long"'):
    choose_variant("lon", {"": 0, "long": 1})


def test_variants_share_their_other_settings():
  easy, long = _config("shapes", ""), _config("shapes", "long")
  assert easy.model == long.model
  assert easy.train.steps < long.train.steps
