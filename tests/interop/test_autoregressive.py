"""Weights of OFA that stay autoregressive: import, export, mistakes."""

import json
import pathlib
import subprocess
import sys
import types
from typing import Any

import numpy as np
import pytest

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.errors import UserError
from narvl_jax.interop import (
  Options,
  convert_official,
  load_official,
  official_shapes,
  save_official,
  transfer,
  variables_from_official,
)
from narvl_jax.interop.export import _unused_tensors
from narvl_jax.interop.key_map import IGNORED, TABLE_KEY, TIED_KEYS
from narvl_jax.interop.run_folder import VocabularyFiles
from narvl_jax.interop.settings import QUERY_KEY, settings_of, size_of
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.models import Autoregressive, model_config
from tests.interop.states import (
  CONFIG,
  COUNTS,
  back,
  check_coverage,
  fitting_config,
  narvl_state,
  ofa_state,
  save,
)
from tests.interop.test_conversion import PARAMETERS

AS_IT_IS = Options(decoder="autoregressive")


@pytest.fixture
def ofa(tmp_path: pathlib.Path) -> pathlib.Path:
  """An OFA in half precision."""
  return save(tmp_path / "x.pt", ofa_state(np.float16))


def test_nothing_is_new(ofa: pathlib.Path) -> None:
  made = convert_official(ofa, AS_IT_IS)
  assert made.config.decoder == "autoregressive"
  assert made.config.vocab_size == CONFIG.vocab_size - 1
  assert made.report["new_or_resized"] == []
  assert made.report["source"]["model"] == "OFA"
  state, got = ofa_state(np.float16), back(made)
  assert QUERY_KEY not in got
  for key, value in got.items():
    np.testing.assert_array_equal(value, state[key], strict=True, err_msg=key)
  # Tensors that only image generation reads are not used here, either.
  assert set(made.unused) == {
    key for key in state if key not in got and not key.endswith("_rp_bucket")
  }
  assert len(made.unused) == 4
  config, variables = load_official(ofa, options=AS_IT_IS)
  assert config == made.config
  assert variables["params"]["embed_tokens"].dtype == np.float32


def test_by_default_it_becomes_a_narvl(ofa: pathlib.Path) -> None:
  for options in (None, Options(decoder="parallel")):
    config, _ = load_official(ofa, options=options)
    assert (config.decoder, config.vocab_size) == ("parallel", 50)


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_size(size: str) -> None:
  """Checks shapes: complete, with N D + D fewer parameters."""
  config = model_config(size, decoder="autoregressive", vocab_size=59457)
  check_coverage(config)
  shapes = official_shapes(config)
  empty: dict[str, Any] = {
    key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()
  }
  unused = _unused_tensors(config, empty)
  no_parameters = ("version", "image_position_idx", "num_batches_tracked")
  count = sum(
    int(np.prod(value.shape))
    for key, value in (empty | unused).items()
    if key not in TIED_KEYS
    and "running" not in key
    and not key.endswith(no_parameters)
  )
  assert count == PARAMETERS[size] - config.width
  assert all(IGNORED.fullmatch(key) for key in unused)
  settings = settings_of(empty)
  assert size_of(settings) == (size, {"decoder": "autoregressive"})
  assert model_config(size, **settings) == config


def test_there_and_back(tmp_path: pathlib.Path, ofa: pathlib.Path) -> None:
  """Exactly, in the dtype of the file, without a vocabulary."""
  there = transfer.import_official(
    ofa, tmp_path / "run", options=AS_IT_IS, check=True
  )
  text = transfer.format_import(there, tmp_path / "run")
  assert "model      micro, autoregressive, 49 ids" in text
  # As many as the fixed request has tokens.
  assert len(there["check"]["best ids"]) == 12
  back = transfer.export_official(tmp_path / "run", tmp_path / "y.pt")
  content = read_torch(tmp_path / "y.pt")
  state = ofa_state(np.float16)
  for key, value in state.items():
    np.testing.assert_array_equal(
      np.asarray(content["model"][key]), value, strict=True, err_msg=key
    )
  assert not set(back["made"]) & set(state)
  assert QUERY_KEY not in content["model"]
  again = convert_official(tmp_path / "y.pt", AS_IT_IS)
  assert again.report["sha256"] == there["sha256"]


def test_settings_of_an_export(tmp_path: pathlib.Path) -> None:
  made = convert_official(save(tmp_path / "x.pt", ofa_state()), AS_IT_IS)
  model = {}
  for arch in (None, "ofa_base", "na_ofa_base"):
    known = types.SimpleNamespace(arch=arch, seed=7, encoder_layers=99)
    target = tmp_path / f"{arch}.pt"
    save_official(
      target,
      made.config,
      made.variables,
      settings={"cfg": {"model": known}} if arch else None,
    )
    content = read_torch(target)
    model[arch] = vars(content["cfg"]["model"])
    assert model[arch]["encoder_layers"] == CONFIG.encoder_layers
    assert content["optimizer_history"][0]["criterion_name"] == (
      "AdjustLabelSmoothedCrossEntropyCriterion"
    )
  # Settings of NARVL do not make an OFA.
  assert [settings["arch"] for settings in model.values()] == [
    "ofa_tiny",
    "ofa_base",
    "ofa_tiny",
  ]
  assert model["ofa_base"]["seed"] == 7
  assert "seed" not in model["na_ofa_base"]
  assert model[None]["add_blank_id_to_dict"] is False


def test_settings_are_those_of_the_official_code(
  tmp_path: pathlib.Path, shared_files: pathlib.Path
) -> None:
  """Every setting that is written is known to the official code."""
  for name, options in (("micro_ar", AS_IT_IS), ("micro_nar", Options())):
    path = shared_files / "fixtures" / f"{name}.lean.pt"
    made = convert_official(path, options)
    save_official(tmp_path / f"{name}.pt", made.config, made.variables)
    content = read_torch(tmp_path / f"{name}.pt")
    about = json.loads(path.with_name(f"{name}.json").read_text())
    settings = vars(content["cfg"]["model"])
    official = {key: about["model_args"].get(key, "?") for key in settings}
    # No type has the recorded trunk; rates depend on the run.
    free = {key for key in settings if "drop_path_rate" in key}
    free.add("resnet_type")
    assert "?" not in official.values()
    assert {k: v for k, v in settings.items() if k not in free} == {
      k: v for k, v in official.items() if k not in free
    }
    assert set(content["model"]) == set(about["state_dict"])
    recorded = read_torch(path)["optimizer_history"]
    assert content["optimizer_history"] == recorded


def test_run_folder(
  tmp_path: pathlib.Path, ofa: pathlib.Path, words: pathlib.Path
) -> None:
  """The config may select the decoder; the blank is an id but no class."""
  config = fitting_config()
  config.model.decoder = "autoregressive"
  config.model.num_queries = 7
  config.data.max_text_length = 8
  transfer.import_official(
    ofa,
    tmp_path / "run",
    vocabulary=VocabularyFiles(words, **COUNTS),
    config=config,
  )
  experiment, variables, _ = load_run(tmp_path / "run")
  assert isinstance(experiment.model, Autoregressive)
  assert experiment.vocabulary.size == 50
  assert experiment.model_config.vocab_size == 49
  np.testing.assert_array_equal(
    variables["params"]["embed_tokens"][:49],
    ofa_state(np.float16)[TABLE_KEY].astype(np.float32),
  )


# Mistakes.


def test_vocabulary_that_does_not_fit(
  tmp_path: pathlib.Path, ofa: pathlib.Path, words: pathlib.Path
) -> None:
  with pytest.raises(
    UserError, match="has 50 ids with 2 codes and 5 bins, the weights have 49"
  ):
    transfer.import_official(
      ofa,
      tmp_path / "run",
      options=AS_IT_IS,
      vocabulary=VocabularyFiles(words, 2, 5),
    )
  assert not (tmp_path / "run").exists()


def test_a_narvl_does_not_become_autoregressive(tmp_path: pathlib.Path) -> None:
  path = save(tmp_path / "x.pt", narvl_state())
  with pytest.raises(
    UserError,
    match=r"^--decoder=autoregressive, but the weights are of NARVL: they have"
    rf" {QUERY_KEY}; nearest valid: --decoder=parallel \(--decoder or",
  ):
    convert_official(path, AS_IT_IS)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"decoder": "autoregresive"},
      '^--decoder="autoregresive" is unknown. Did you mean "autoregressive"',
    ),
    (
      {"decoder": "autoregressive", "num_queries": 5},
      "^--num_queries=5 has no meaning with --decoder=autoregressive, .*leave",
    ),
    (
      {"decoder": "autoregressive", "blank_row": "unk"},
      "^--blank_row=unk has no meaning with --decoder=autoregressive",
    ),
  ],
)
def test_options_that_do_not_fit(options: Any, message: str) -> None:
  with pytest.raises(UserError, match=message):
    Options(**options)


def test_config_and_flag_that_differ(
  tmp_path: pathlib.Path, ofa: pathlib.Path
) -> None:
  config = fitting_config()
  config.model.decoder = "parallel"
  with pytest.raises(
    UserError,
    match=r"--decoder=autoregressive, but --config has model.decoder=parallel;"
    r" .* or set --config.model.decoder=autoregressive$",
  ):
    transfer.import_official(
      ofa, tmp_path / "run", options=AS_IT_IS, config=config
    )


def test_weights_of_the_other_model_are_rejected_with_the_flag() -> None:
  counterpart = model_config(
    "micro", **vars(CONFIG) | {"decoder": "autoregressive", "vocab_size": 49}
  )
  with pytest.raises(
    UserError,
    match=f"lack 1 of .* tensors: {QUERY_KEY}; nearest configuration:.*"
    " --config.model.decoder=autoregressive",
  ):
    variables_from_official(ofa_state(), CONFIG)
  with pytest.raises(
    UserError, match=r"nearest configuration:.* --config.model.decoder=parallel"
  ):
    variables_from_official(narvl_state(), counterpart)


def test_flag_of_the_command(ofa: pathlib.Path) -> None:
  done = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.convert", f"--from={ofa}"),
      *(f"--to={ofa.parent / 'run'}", "--decoder=causal"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith('error: --decoder="causal" is unknown.')
