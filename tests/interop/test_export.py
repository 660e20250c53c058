"""Files for the official code."""

import json
import pathlib
import types

import numpy as np

from narvl_jax.interop import (
  convert_official,
  save_official,
)
from narvl_jax.interop.export import _buckets, _unused_tensors
from narvl_jax.interop.key_map import TABLE_KEY, TIED_KEYS
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.models import model_config
from tests.interop.states import (
  narvl_state,
  ofa_state,
  save,
)


def test_export_there_and_back(tmp_path: pathlib.Path) -> None:
  state = narvl_state(np.float16)
  known = types.SimpleNamespace(arch="na_ofa_base", seed=7, num_queries=99)
  save(tmp_path / "x.pt", state, args=None, cfg={"model": known, "task": 3})
  made = convert_official(tmp_path / "x.pt")
  filled = save_official(
    tmp_path / "y.pt",
    made.config,
    made.variables,
    unused=made.unused,
    settings=made.source.settings,
  )
  content = read_torch(tmp_path / "y.pt")
  model = content["model"]
  for key, value in state.items():
    np.testing.assert_array_equal(
      np.asarray(model[key]), value, strict=True, err_msg=key
    )
  assert not set(filled) & set(state)
  for key in TIED_KEYS:
    assert model[key].identity == model[TABLE_KEY].identity
  settings = content["cfg"]["model"]
  assert (settings.arch, settings.seed, settings.num_queries) == (
    "na_ofa_base",
    7,
    4,
  )
  assert content["cfg"]["task"] == 3


def test_export_without_a_source(tmp_path: pathlib.Path) -> None:
  made = convert_official(save(tmp_path / "x.pt", ofa_state()))
  filled = save_official(tmp_path / "y.pt", made.config, made.variables)
  again = convert_official(tmp_path / "y.pt")
  assert again.config == made.config
  assert again.report["variables"] == made.report["variables"]
  assert set(filled) <= set(again.unused)
  assert again.source.settings["cfg"]["model"].arch == "na_ofa_tiny"  # pyright: ignore


def test_values_of_buckets() -> None:
  image = _buckets(model_config("tiny"))["encoder.image_rp_bucket"]
  expected = {
    (0, 5): 6889,
    (5, 0): 6890,
    (0, 0): 6891,
    (1, 1): 3444,
    (1, 2): 3443,
    (2, 1): 3445,
    (1, 43): 3361,
    (43, 1): 3527,
  }
  assert {place: image[place] for place in expected} == expected


def test_buckets_are_the_official_ones(shared_files: pathlib.Path) -> None:
  about = json.loads((shared_files / "fixtures/micro_nar.json").read_text())
  config = model_config("tiny")
  sums = {
    key: entry[2]
    for key, entry in about["state_dict"].items()
    if key.endswith(("_rp_bucket", "image_position_idx"))
  }
  empty = {TABLE_KEY: np.zeros((1, 1), np.float32)}
  made = _buckets(config) | _unused_tensors(config, empty)
  assert len(sums) == 5
  assert {key: int(made[key].sum()) for key in sums} == sums
