"""Official files to variables: names, what is new, and the account."""

import json
import pathlib
import types
from typing import Any

import jax
import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import (
  Options,
  convert_official,
  load_official,
  official_from_variables,
  official_shapes,
  save_official,
)
from narvl_jax.interop import key_map as key_map_lib
from narvl_jax.interop.conversion import check_coverage
from narvl_jax.interop.export import _buckets, _unused_tensors
from narvl_jax.interop.key_map import IGNORED, TABLE_KEY, TIED_KEYS
from narvl_jax.interop.names import official_names
from narvl_jax.interop.settings import (
  IMAGE_POSITIONS_KEY,
  QUERY_KEY,
  settings_of,
  size_of,
)
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.models import model_config
from tests.interop.states import CONFIG, State, narvl_state, ofa_state
from tests.interop.test_safetensors_file import write as write_safetensors

# What the reference specification says of the five sizes: parameters without
# queries, and the entries of a state dict of `base`.
PARAMETERS = {
  "tiny": 33_488_592,
  "medium": 92_892_512,
  "base": 182_239_304,
  "large": 472_978_176,
  "huge": 929_488_128,
}


def save(path: pathlib.Path, state: State, **more: Any) -> pathlib.Path:
  write_torch(path, {"model": state, **more})
  return path


def back(made: Any) -> State:
  return official_from_variables(made.variables, made.config)


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
  """Corners stay, and a smooth table stays the same function."""
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


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"num_queries": 0}, "--num_queries=0 is below 1; nearest valid: .*=1"),
    ({"num_queries": 27}, "exceeds the 26 positions .*: --num_queries=26"),
    ({"seed": -1}, "--seed=-1 is below 0; nearest valid: --seed=0"),
    ({"blank_row": "means"}, 'unknown. Did you mean "mean"'),
    ({"stretch_images": (48, 90)}, "90 is not a multiple .* valid: 96"),
    ({"stretch_images": (64, 96)}, "reach to 48 pixels, not to 64"),
  ],
)
def test_options_that_do_not_fit(
  tmp_path: pathlib.Path, options: Any, message: str
) -> None:
  save(tmp_path / "x.pt", narvl_state())
  with pytest.raises(UserError, match=message):
    convert_official(tmp_path / "x.pt", Options(**options))


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


def test_names_that_meet() -> None:
  value = np.zeros(3)
  state = {
    "decoder.layers.0.encoder_attn.c_attn": value,
    "decoder.layers.0.cross_attn.c_attn": value,
  }
  with pytest.raises(UserError, match=r"are both decoder.layers.0.encoder_a"):
    official_names(state)
  with pytest.raises(UserError, match="has 4 rows, which are not those of"):
    official_names({"decoder.layers.0.self_attn.in_proj_bias": np.zeros(4)})


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
  with pytest.raises(UserError, match="other has a moving average but is no"):
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


def test_what_is_left_over_missing_or_untied(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.pt"
  save(path, narvl_state() | {"encoder.adapter.weight": np.zeros(3)})
  with pytest.raises(
    UserError, match=r"from=.*x.pt: .* 1 unknown tensors: encoder.adapter"
  ):
    convert_official(path)
  state = narvl_state()
  del state["encoder.layers.1.fc1.bias"]
  save(path, state)
  with pytest.raises(
    UserError, match=r"x.pt: official weights lack 1 of .*s.1.fc1.bias"
  ):
    convert_official(path)
  state = narvl_state()
  save(path, state | {TIED_KEYS[1]: state[TABLE_KEY] + 1})
  with pytest.raises(UserError, match=f"x.pt: {TIED_KEYS[1]} differs from"):
    convert_official(path)
  save(path, {"a": np.zeros(3)})
  with pytest.raises(
    UserError, match=r"from=.*x.pt: there is no encoder.embed"
  ):
    convert_official(path)


def test_damaged_weights(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.pt"
  state = narvl_state()
  save(path, state)
  key = "encoder.layers.1.fc1.bias"
  data = bytearray(path.read_bytes())
  data[data.index(state[key].tobytes()) + 1] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match=rf"x.pt is damaged: the bytes of {key}"):
    convert_official(path)
  for wrong in (np.nan, -np.inf):
    bad = narvl_state()
    bad[key][2] = wrong
    save(path, bad)
    with pytest.raises(UserError, match=rf"x.pt: .*{key} holds 1 of 20 values"):
      convert_official(path)
  bad = narvl_state()
  bad[key] = bad[key].astype(np.int64)
  save(path, bad)
  with pytest.raises(UserError, match=rf"{key} has type int64; valid: float16"):
    convert_official(path)


def test_values_that_nothing_reads_may_be_anything(
  tmp_path: pathlib.Path,
) -> None:
  state = narvl_state()
  state["decoder.image_pos_ln.weight"][:] = np.nan
  made = convert_official(save(tmp_path / "x.pt", state))
  assert "decoder.image_pos_ln.weight" in made.unused


def test_files_without_weights(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.pt"
  message = r"without model.safetensors and pytorch_model.bin"
  with pytest.raises(UserError, match=f"{message}$"):
    convert_official(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match=f"{message}; a run is .*=FILE.pt$"):
    convert_official(tmp_path)
  for content, message in (
    ({}, "holds no tensors"),
    ({"model": {"a": 3}}, "a is no tensor but of type int"),
  ):
    write_torch(path, content)
    with pytest.raises(UserError, match=message):
      convert_official(path)


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size_is_covered(size: str) -> None:
  """By shapes alone: each tensor is used once, each variable filled once."""
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
