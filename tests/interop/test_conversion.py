"""Official files to variables: names, new tensors, and the report."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import (
  Options,
  convert_official,
  load_official,
  official_shapes,
)
from narvl_jax.interop import key_map as key_map_lib
from narvl_jax.interop.export import _buckets, _unused_tensors
from narvl_jax.interop.key_map import IGNORED, TABLE_KEY, TIED_KEYS
from narvl_jax.interop.settings import (
  IMAGE_POSITIONS_KEY,
  QUERY_KEY,
  settings_of,
  size_of,
)
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.models import model_config
from tests.interop.states import (
  CONFIG,
  State,
  back,
  check_coverage,
  narvl_state,
  ofa_state,
  save,
)
from tests.interop.test_safetensors_file import write as write_safetensors

# From the reference specification: parameters of the five sizes without
# queries.
PARAMETERS = {
  "tiny": 33_488_592,
  "medium": 92_892_512,
  "base": 182_239_304,
  "large": 472_978_176,
  "huge": 929_488_128,
}


def test_narvl(tmp_path: pathlib.Path) -> None:
  state = narvl_state()
  made = convert_official(save(tmp_path / "x.pt", state))
  assert vars(made.config) | {"vocab_multiple": 128} == vars(CONFIG)
  assert made.report["new_or_resized"] == []
  assert made.report["source"]["model"] == "NARVL"
  for key, value in back(made).items():
    np.testing.assert_array_equal(value, state[key], strict=True, err_msg=key)
  config, variables = load_official(tmp_path / "x.pt")
  assert config == made.config
  np.testing.assert_array_equal(
    variables["params"]["embed_tokens"],
    made.variables["params"]["embed_tokens"],
  )


@pytest.mark.parametrize(
  ("dtype", "kept"),
  [
    (np.float16, np.float16),
    (jax.numpy.bfloat16, jax.numpy.bfloat16),
    (np.float64, np.float32),
  ],
)
def test_types(tmp_path: pathlib.Path, dtype: Any, kept: Any) -> None:
  state = narvl_state(dtype)
  made = convert_official(save(tmp_path / "x.pt", state))
  assert {x.dtype for x in jax.tree.leaves(made.variables)} == {np.dtype(kept)}
  np.testing.assert_array_equal(
    back(made)[TABLE_KEY], state[TABLE_KEY].astype(kept), strict=True
  )
  _, variables = load_official(tmp_path / "x.pt")
  assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype("float32")}


def test_ofa_gets_queries_and_a_blank(tmp_path: pathlib.Path) -> None:
  state = ofa_state()
  made = convert_official(save(tmp_path / "x.pt", state))
  assert made.report["source"]["model"] == "OFA"
  got = back(made)
  assert made.config.vocab_size == 50
  np.testing.assert_array_equal(got[TABLE_KEY][:-1], state[TABLE_KEY])
  blank = got[TABLE_KEY][-1]
  assert 0.3 < blank.std() * 12**0.5 < 3
  assert got[QUERY_KEY].shape == (20, 12)
  assert 0.015 < got[QUERY_KEY].std() < 0.025
  for key in state.keys() & got.keys() - {TABLE_KEY, *TIED_KEYS}:
    np.testing.assert_array_equal(got[key], state[key], err_msg=key)
  changes = {c["key"]: c for c in made.report["new_or_resized"]}
  assert changes.keys() == {TABLE_KEY, QUERY_KEY}
  assert changes[TABLE_KEY]["before"] == (49, 12)
  assert changes[QUERY_KEY]["before"] is None
  again = back(convert_official(tmp_path / "x.pt"))
  np.testing.assert_array_equal(again[QUERY_KEY], got[QUERY_KEY])
  other = back(convert_official(tmp_path / "x.pt", Options(seed=1)))
  assert not np.array_equal(other[QUERY_KEY], got[QUERY_KEY])


def test_blank_row(tmp_path: pathlib.Path) -> None:
  state = ofa_state()
  save(tmp_path / "x.pt", state)
  for choice, expected in (
    ("mean", state[TABLE_KEY].mean(0)),
    ("unk", state[TABLE_KEY][3]),
  ):
    made = convert_official(tmp_path / "x.pt", Options(blank_row=choice))
    np.testing.assert_allclose(back(made)[TABLE_KEY][-1], expected, rtol=1e-6)
    assert choice in made.report["new_or_resized"][0]["how"]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_queries_are_kept_cut_and_extended(
  tmp_path: pathlib.Path, count: int
) -> None:
  state = narvl_state()
  save(tmp_path / "x.pt", state)
  made = convert_official(tmp_path / "x.pt", Options(num_queries=count))
  queries, old = back(made)[QUERY_KEY], state[QUERY_KEY]
  assert queries.shape == (count, 12)
  assert made.config.num_queries == count
  kept = min(count, 4)
  np.testing.assert_array_equal(queries[:kept], old[:kept])
  assert np.abs(queries[kept:]).max(initial=0) < 0.1
  assert len(made.report["new_or_resized"]) == (count != 4)


def test_early_files_get_the_missing_image_positions(
  tmp_path: pathlib.Path,
) -> None:
  state = narvl_state()
  whole = state[IMAGE_POSITIONS_KEY]
  state[IMAGE_POSITIONS_KEY] = whole[:6]
  made = convert_official(save(tmp_path / "x.pt", state))
  table = back(made)[IMAGE_POSITIONS_KEY]
  assert table.shape == whole.shape
  np.testing.assert_array_equal(table[:6], whole[:6])
  assert np.abs(table[6:]).min() > 0
  assert "4 rows appended" in made.report["new_or_resized"][0]["how"]


def test_positions_are_stretched(tmp_path: pathlib.Path) -> None:
  """Corners are kept, and a smooth table stays the same function."""
  state = narvl_state()
  y, x = np.mgrid[:3, :3]
  plane = (2.0 * y - x)[..., None] + np.arange(12)
  state[IMAGE_POSITIONS_KEY][1:] = plane.reshape(9, 12)
  dy, dx = np.mgrid[-2:3, -2:3]
  slope = (dy + 3.0 * dx)[..., None] * np.array([1, 2, 3])
  key = "encoder.image_rel_pos_table_list.1.weight"
  state[key][:25] = slope.reshape(25, 3)
  save(tmp_path / "x.pt", state)
  options = Options(stretch_images=(48, 80))
  made = convert_official(tmp_path / "x.pt", options)
  assert made.config.image_bucket_size == 5
  got = back(made)
  table = got[IMAGE_POSITIONS_KEY]
  np.testing.assert_array_equal(table[0], state[IMAGE_POSITIONS_KEY][0])
  grid = table[1:].reshape(5, 5, 12)
  np.testing.assert_allclose(grid[::2, ::2], plane, atol=1e-5)
  # Distances of 2 at 3 x 3 are distances of 4 at 5 x 5.
  large = got[key][:81].reshape(9, 9, 3)
  np.testing.assert_allclose(large[::2, ::2], slope.reshape(5, 5, 3), atol=1e-4)
  np.testing.assert_array_equal(got[key][81:], state[key][25:])
  changed = {c["key"] for c in made.report["new_or_resized"]}
  assert len(changed) == 4


def test_stretching_within_the_table_keeps_the_rest(
  tmp_path: pathlib.Path,
) -> None:
  state = narvl_state()
  save(tmp_path / "x.pt", state)
  made = convert_official(tmp_path / "x.pt", Options(stretch_images=(48, 32)))
  old = state[IMAGE_POSITIONS_KEY][1:].reshape(3, 3, 12)
  new = back(made)[IMAGE_POSITIONS_KEY][1:].reshape(3, 3, 12)
  np.testing.assert_array_equal(new[2], old[2])
  np.testing.assert_array_equal(new[:, 2], old[:, 2])
  assert not np.array_equal(new[:2, :2], old[:2, :2])


def to_hugging_face(state: State) -> State:
  """Names of the Hugging Face port, from its public model class."""
  renamed = {}
  for key, value in state.items():
    name = key.replace("ffn_layernorm", "ffn_layer_norm")
    if name.startswith("encoder.layers"):
      name = name.replace(".attn_ln.", ".self_attn_mid_layer_norm.")
    if name.startswith("decoder.layers"):
      for a, b in (
        ("self_attn_ln", "self_attn_mid_layer_norm"),
        ("cross_attn_ln", "cross_attn_mid_layer_norm"),
        ("encoder_attn_layer_norm", "cross_attn_layer_norm"),
        ("encoder_attn", "cross_attn"),
      ):
        name = name.replace(f".{a}.", f".{b}.")
    renamed[name] = value
  return renamed


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_hugging_face_folders(tmp_path: pathlib.Path, file: str) -> None:
  state = ofa_state()
  theirs = to_hugging_face(state)
  assert len(theirs.keys() - state.keys()) == 46
  if file.endswith(".bin"):
    write_torch(tmp_path / file, theirs)
  else:
    write_safetensors(tmp_path / file, theirs)
  made = convert_official(tmp_path)
  assert made.report["source"]["format"] == "Hugging Face"
  save(tmp_path / "x.pt", state)
  expected = convert_official(tmp_path / "x.pt")
  assert made.report["variables"] == expected.report["variables"]
  assert set(made.report["tensors"]) == set(theirs)


def test_old_names_and_fused_projections(tmp_path: pathlib.Path) -> None:
  state = narvl_state()
  old = dict(state)
  for part in ("weight", "bias"):
    stem = "decoder.layers.1.self_attn"
    old[f"{stem}.in_proj_{part}"] = np.concatenate(
      [old.pop(f"{stem}.{letter}_proj.{part}") for letter in "qkv"]
    )
    for layer, names in (
      ("encoder.layers.0", ("self_attn_layer_norm", "final_layer_norm")),
      (
        "decoder.layers.0",
        ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
      ),
    ):
      for i, name in enumerate(names):
        value = old.pop(f"{layer}.{name}.{part}")
        old[f"{layer}.layer_norms.{i}.{part}"] = value
  old["classification_heads.mnli.dense.weight"] = np.ones((2, 2))
  made = convert_official(save(tmp_path / "x.pt", old))
  for key, value in back(made).items():
    np.testing.assert_array_equal(value, state[key], err_msg=key)
  assert set(made.report["tensors"]) == set(old)
  account = made.report["tensors"]
  assert account["classification_heads.mnli.dense.weight"].startswith("dropped")
  fused = account["decoder.layers.1.self_attn.in_proj_weight"]
  assert fused.count("decoder/layers/self_attn/qkv/kernel") == 3


def test_moving_averages(tmp_path: pathlib.Path) -> None:
  state = narvl_state()
  averages = {QUERY_KEY: state[QUERY_KEY] + 1}
  path = save(tmp_path / "x.pt", state, extra_state={"ema": averages})
  for ema in (False, True):
    made = convert_official(path, ema=ema)
    np.testing.assert_array_equal(back(made)[QUERY_KEY], state[QUERY_KEY] + ema)
  assert made.report["source"]["weights"] == "moving averages"
  for more in ({}, {"extra_state": {}}):
    save(path, state, **more)
    with pytest.raises(
      UserError, match=r"no moving averages .*leave --ema out"
    ):
      convert_official(path, ema=True)
  write_torch(path, state)
  with pytest.raises(UserError, match="is not of fairseq and has no moving"):
    convert_official(path, ema=True)
  save(path, state, extra_state={"ema": {"other": state[QUERY_KEY]}})
  with pytest.raises(UserError, match="other has a moving average but is not"):
    convert_official(path, ema=True)


def test_account(tmp_path: pathlib.Path) -> None:
  state = narvl_state()
  state["encoder.token_rp_bucket"] = np.zeros((4, 4), np.int64)
  made = convert_official(save(tmp_path / "x.pt", state))
  report = json.loads(json.dumps(made.report))
  account = report["tensors"]
  assert list(account) == list(state)
  assert account[QUERY_KEY] == "params/decoder/query_embed"
  assert account[TIED_KEYS[0]] == "tied to params/embed_tokens"
  assert account["encoder.token_rp_bucket"] == "computed"
  unused = [key for key, how in account.items() if "not read here" in how]
  assert set(unused) == set(made.unused)
  assert len(unused) == 4
  flat = jax.tree.leaves(made.variables)
  assert len(report["variables"]) == len(flat)
  other = narvl_state()
  other["decoder.layers.1.fc2.bias"][0] += 1
  changed = convert_official(save(tmp_path / "y.pt", other)).report
  different = {
    name
    for name, digest in changed["variables"].items()
    if digest != report["variables"][name]
  }
  assert different == {"params/decoder/layers/ffn/fc2_bias"}
  assert changed["sha256"] != report["sha256"]


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_is_covered(size: str) -> None:
  """Checks shapes: each tensor is used once, each variable filled once."""
  config = model_config(size, num_queries=13)
  check_coverage(config)
  shapes = official_shapes(config)
  empty: dict[str, Any] = {
    key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
  }
  whole = empty | _unused_tensors(config, empty)
  no_parameters = ("version", "image_position_idx", "num_batches_tracked")
  count = sum(
    int(np.prod(value.shape))
    for key, value in whole.items()
    if key not in TIED_KEYS
    and "running" not in key
    and not key.endswith(no_parameters)
  )
  assert count == PARAMETERS[size] + 13 * config.width
  settings = settings_of(empty)
  assert size_of(settings) == (size, {"num_queries": 13})
  assert model_config(size, **settings) == config
  if size == "base":
    whole |= _buckets(config)
    assert len(whole) == 968
    assert all(k in shapes or IGNORED.fullmatch(k) for k in whole)


def test_coverage_fails_if_the_table_is_wrong(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  rows = key_map_lib._DECODER
  for wrong, message in ((rows[1:], "not filled"), ((*rows, rows[0]), "twice")):
    monkeypatch.setattr(key_map_lib, "_DECODER", wrong)
    with pytest.raises(AssertionError, match=message):
      check_coverage(CONFIG)
