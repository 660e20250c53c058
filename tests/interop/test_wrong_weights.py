"""Official files that are damaged, incomplete or of another model."""

import pathlib
from typing import Any

import numpy as np
import pytest

from narvl_jax.errors import UserError
from narvl_jax.interop import (
  Options,
  convert_official,
)
from narvl_jax.interop.key_map import TABLE_KEY, TIED_KEYS
from narvl_jax.interop.names import official_names
from narvl_jax.interop.settings import QUERY_KEY
from narvl_jax.interop.torch_write import write_torch
from tests.interop.states import (
  narvl_state,
  save,
)


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
  with pytest.raises(
    UserError, match=f"x.pt: official weight {TIED_KEYS[1]} differs from"
  ):
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
    with pytest.raises(
      UserError, match=rf"x.pt: .*{key} contains 1 of 20 values"
    ):
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
    ({}, "has no tensors"),
    ({"model": {"a": 3}}, "a is not a tensor but of type int"),
  ):
    write_torch(path, content)
    with pytest.raises(UserError, match=message):
      convert_official(path)


@pytest.mark.parametrize(
  ("key", "shape"),
  [(QUERY_KEY, ()), ("encoder.token_rel_pos_table_list.0.weight", (1, 3))],
)
def test_shapes_that_contradict_each_other(
  tmp_path: pathlib.Path, key: str, shape: tuple[int, ...]
) -> None:
  state = narvl_state() | {key: np.zeros(shape, np.float32)}
  with pytest.raises(UserError, match=r"from=.*x.pt: .*(no model|shape)"):
    convert_official(save(tmp_path / "x.pt", state))
