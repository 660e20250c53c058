"""The command: a run folder out of a file, a file out of a run folder."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types
from typing import Any

import numpy as np
import pytest
from absl import flags

from narvl_jax import convert
from narvl_jax import experiment as experiment_lib
from narvl_jax.data.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.interop import Options, official_from_variables
from narvl_jax.interop.run_folder import read_run
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.training.checkpoints import Checkpoints
from tests.interop.states import CONFIG, narvl_state, ofa_state
from tests.training.tiny import tiny_config

COUNTS: Any = {"num_codes": 2, "num_bins": 4}
BASE = 50 - 4 - 2 - 6


@pytest.fixture
def official(tmp_path: pathlib.Path) -> pathlib.Path:
  """A NARVL in half precision."""
  write_torch(tmp_path / "x.pt", {"model": narvl_state(np.float16)})
  return tmp_path / "x.pt"


@pytest.fixture
def words(tmp_path: pathlib.Path) -> pathlib.Path:
  """The files of a vocabulary of 50 ids."""
  folder = tmp_path / "words"
  folder.mkdir()
  letters = [chr(ord("a") + i) for i in range(26)] + list("ABCDEFGHIJKL")
  assert len(letters) == BASE
  encoder = {letter: i for i, letter in enumerate(letters)}
  (folder / "encoder.json").write_text(json.dumps(encoder))
  (folder / "vocab.bpe").write_text("#version: 0.2\n")
  lines = "".join(f"{i} 1\n" for i in range(BASE))
  (folder / "dict.txt").write_text(lines)
  return folder


def fitting_config() -> Any:
  """A config whose pictures and prompts the small tables allow."""
  config = tiny_config()
  config.model = type(config)(config.model.to_dict())
  for name in config.model:
    if name not in ("size", "dtype"):
      config.model[name] = None
  config.data.max_text_length = 26
  return config


def test_run_folder(
  tmp_path: pathlib.Path, official: pathlib.Path, words: pathlib.Path
) -> None:
  run = tmp_path / "run"
  report = convert.import_official(
    official, run, vocabulary=words, config=fitting_config(), **COUNTS
  )
  assert json.loads((run / "report.json").read_text()) == json.loads(
    json.dumps(report)
  )
  experiment, variables, step = experiment_lib.restore(run)
  assert step == 0
  assert experiment.vocabulary.size == 50
  assert experiment.model_config.num_queries == CONFIG.num_queries
  got = official_from_variables(variables, experiment.model_config)
  for key, value in narvl_state(np.float16).items():
    if key in got:
      assert got[key].dtype == np.float32
      np.testing.assert_array_equal(got[key], value.astype(np.float32))
  assert report["vocabulary"] == experiment.vocabulary.fingerprint
  assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_there_and_back(tmp_path: pathlib.Path, official: pathlib.Path) -> None:
  """Bit by bit, in the type of the file, without a vocabulary."""
  convert.import_official(official, tmp_path / "run")
  report = convert.export_official(tmp_path / "run", tmp_path / "y.pt")
  model = read_torch(tmp_path / "y.pt")["model"]
  for key, value in narvl_state(np.float16).items():
    np.testing.assert_array_equal(
      np.asarray(model[key]), value, strict=True, err_msg=key
    )
  assert report["step"] == 0
  with pytest.raises(UserError, match=r"y.pt exists; name a new file"):
    convert.export_official(tmp_path / "run", tmp_path / "y.pt")


def test_side_file_of_the_weights_that_a_run_began_with(
  tmp_path: pathlib.Path, official: pathlib.Path, words: pathlib.Path
) -> None:
  first, run = tmp_path / "first", tmp_path / "run"
  convert.import_official(
    official, first, vocabulary=words, config=fitting_config(), **COUNTS
  )
  experiment, variables, _ = experiment_lib.restore(first)
  experiment.config.init_from = str(first)
  experiment.save(run)
  with Checkpoints(run, keep_last=1) as checkpoints:
    checkpoints.save_variables(3, variables)
  report = convert.export_official(run, tmp_path / "y.pt")
  assert report["step"] == 3
  key = "decoder.embed_image_positions.weight"
  assert key not in report["made"]
  model = read_torch(tmp_path / "y.pt")["model"]
  np.testing.assert_array_equal(
    np.asarray(model[key]), narvl_state(np.float16)[key]
  )


def test_check_is_the_same_there_and_back(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  there = convert.import_official(official, tmp_path / "run", check=True)
  back = convert.export_official(
    tmp_path / "run", tmp_path / "y.pt", check=True
  )
  assert back["check"] == there["check"]
  text = convert.format_forward(there["check"])
  assert len(text.splitlines()) == 5
  state = narvl_state(np.float16)
  state["decoder.query_embed.weight"] *= np.float16(1.5)
  write_torch(official, {"model": state})
  other = convert.import_official(official, tmp_path / "other", check=True)
  assert other["check"]["encoder_out"] == there["check"]["encoder_out"]
  assert other["check"]["logits"] != there["check"]["logits"]


def test_text_of_a_report(
  tmp_path: pathlib.Path,
) -> None:
  write_torch(tmp_path / "x.pt", {"model": ofa_state()})
  report = convert.import_official(tmp_path / "x.pt", tmp_path / "run")
  text = convert.format_import(report, tmp_path / "run")
  assert "OFA weights (official names, model, float32)" in text
  assert "query_embed.weight: new -> [20, 12], 20 new queries" in text
  assert "embed_tokens.weight: [49, 12] -> [50, 12], last row is the" in text
  assert "predict and evaluate cannot read it" in text
  assert "--config.init_from=" in text


def test_vocabulary_that_does_not_fit(
  tmp_path: pathlib.Path, official: pathlib.Path, words: pathlib.Path
) -> None:
  run = tmp_path / "run"
  with pytest.raises(
    UserError, match="has 51 ids with 2 codes and 5 bins, the weights have 50"
  ):
    convert.import_official(
      official, run, vocabulary=words, num_codes=2, num_bins=5
    )
  with pytest.raises(UserError, match=r"holds neither dict.txt, .* nor vocab"):
    convert.import_official(official, run, vocabulary=tmp_path)
  with pytest.raises(UserError, match=r"^--vocabulary=\S+none: there is no su"):
    convert.import_official(official, run, vocabulary=tmp_path / "none")
  for name, text, message in (
    ("encoder.json", "{", r"encoder.json is not JSON.*set --vocabulary$"),
    ("encoder.json", '{"<s>": 1}', r"vocab.json and no .*set --vocabulary=FOL"),
    ("dict.txt", "a\n", r"set --vocabulary to the folder of the official"),
  ):
    before = (words / name).read_text()
    (words / name).write_text(text)
    with pytest.raises(UserError, match=message):
      convert.import_official(official, run, vocabulary=words, **COUNTS)
    (words / name).write_text(before)
  with pytest.raises(UserError, match=r"num_bins is -1; .* set --num_bins$"):
    convert.import_official(
      official, run, vocabulary=words, num_codes=2, num_bins=-1
    )
  assert not run.exists()


def test_counts_and_vocabulary_beside_the_weights(
  tmp_path: pathlib.Path, words: pathlib.Path
) -> None:
  model = types.SimpleNamespace(code_dict_size=2, num_bins=4)
  content = {"model": narvl_state(), "cfg": {"model": model}}
  write_torch(words / "x.pt", content)
  convert.import_official(words / "x.pt", tmp_path / "run")
  assert Vocabulary.load(tmp_path / "run" / "vocabulary").num_codes == 2


def test_target_that_is_not_empty(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  with pytest.raises(UserError, match="is not empty; use a folder that is new"):
    convert.import_official(official, tmp_path)
  with pytest.raises(UserError, match=r"^--to=\S+ is a file, not a folder"):
    convert.import_official(official, official)
  with pytest.raises(UserError, match=r"^--to=\S+/y is below \S+x.pt, a file"):
    convert.import_official(official, official / "y")


def test_targets_that_cannot_be_written(
  tmp_path: pathlib.Path,
  official: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  run = tmp_path / "run"
  convert.import_official(official, run)
  with pytest.raises(UserError, match=r"^--to=\S+/y.pt: \S+x.pt is a file"):
    convert.export_official(run, official / "y.pt")
  link = tmp_path / "link.pt"
  link.symlink_to(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"link.pt exists; name a new file"):
    convert.export_official(run, link)
  before = set(tmp_path.iterdir())

  def fail(*_: Any, **__: Any) -> None:
    raise FileNotFoundError(2, "No such file or directory")

  # As below /proc, whose permissions promise what it does not keep.
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "mkdir", fail)
    message = "^--to=.* cannot be written: No such file or directory; use"
    with pytest.raises(UserError, match=message):
      convert.export_official(run, tmp_path / "y.pt")
    with pytest.raises(UserError, match=message):
      convert.import_official(official, tmp_path / "new")
  assert set(tmp_path.iterdir()) == before


def test_config_of_another_size(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  config = fitting_config()
  config.model.size = "tiny"
  with pytest.raises(
    UserError,
    match=r"--config is of size tiny \(D=256\), but --from=\S+x.pt of size"
    r" micro \(D=12\); set --config.model.size=micro",
  ):
    convert.import_official(official, tmp_path / "run", config=config)
  assert not (tmp_path / "run").exists()


def test_queries_of_config_and_flag(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  config = fitting_config()
  config.model.num_queries = 6
  with pytest.raises(
    UserError,
    match=r"--num_queries=5, but --config has model.num_queries=6; leave",
  ):
    convert.import_official(
      official, tmp_path / "a", config=config, options=Options(num_queries=5)
    )
  for name, options in (("a", None), ("b", Options(num_queries=6))):
    report = convert.import_official(
      official, tmp_path / name, config=config, options=options
    )
    assert report["model"]["num_queries"] == 6


def test_nothing_is_left_of_a_failure(
  tmp_path: pathlib.Path,
  official: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  before = set(tmp_path.iterdir())

  def fail(*_: Any) -> None:
    raise OSError("disk full")

  monkeypatch.setattr(convert.run_folder, "write_torch", fail)
  with pytest.raises(OSError, match="disk full"):
    convert.import_official(official, tmp_path / "run")
  assert set(tmp_path.iterdir()) == before


def test_runs_that_are_none(
  tmp_path: pathlib.Path, official: pathlib.Path
) -> None:
  with pytest.raises(UserError, match=r"is no run: .* --to=FOLDER"):
    convert.export_official(official, tmp_path / "y.pt")
  assert not (tmp_path / "y.pt").exists()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.convert", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command(tmp_path: pathlib.Path) -> None:
  write_torch(tmp_path / "x.pt", {"model": ofa_state()})
  done = command(
    f"--from={tmp_path}/x.pt",
    f"--to={tmp_path}/run",
    "--num_queries=6",
    "--blank_row=unk",
    "--stretch_images=48,80",
    "--check",
  )
  assert (done.returncode, done.stderr) == (0, "")
  assert "6 queries, 50 ids" in done.stdout
  assert "best ids" in done.stdout
  config, variables, _ = read_run(tmp_path / "run")
  assert (config.num_queries, config.image_bucket_size) == (6, 5)
  table = variables["params"]["embed_tokens"]
  np.testing.assert_array_equal(table[49], table[3])
  wrong = command(
    f"--from={tmp_path}/x.pt", f"--to={tmp_path}/b", "--stretch_images=5"
  )
  assert wrong.returncode == 2
  assert "is not two sides in pixels, such as" in wrong.stderr
  assert wrong.stderr.count("\n") == 1
  wrong = command("--from=x.pt", "--to=b", "--num_queries=five")
  assert wrong.returncode == 2
  assert wrong.stderr == (
    'error: --num_queries="five": not a whole number, such as 5\n'
  )
  assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
  ("target", "more", "message"),
  [
    ("y.safetensors", (), "files are of torch and end in .pt; nearest .*y.pt"),
    (
      "y.bin",
      (),
      "files are of torch and end in .pt; nearest valid: --to=y.pt",
    ),
    ("y.pt", ("--num_queries=3",), "--num_queries has no meaning .* a file;"),
    ("y", ("--checkpoint=3",), "--checkpoint has no meaning .* a folder;"),
  ],
)
def test_flags_of_the_other_direction(
  monkeypatch: pytest.MonkeyPatch,
  target: str,
  more: tuple[str, ...],
  message: str,
) -> None:
  values = flags.FlagValues()
  with monkeypatch.context() as patch:
    patch.setattr(flags, "FLAGS", values)
    for name in ("from", "to", "num_queries"):
      flags.DEFINE_string(name, None, "", flag_values=values)
    for name in (*convert._IMPORT_FLAGS, *convert._EXPORT_FLAGS):
      if name not in values:
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(["convert", "--from=x", f"--to={target}", *more])
    with pytest.raises(UserError, match=message):
      convert.main([])


def test_memory(tmp_path: pathlib.Path) -> None:
  """A larger file adds little more than its size to the peak."""
  script = textwrap.dedent("""
    import resource, sys
    from narvl_jax import convert
    convert.import_official(sys.argv[1], sys.argv[2])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
  """)
  state = narvl_state()
  small = tmp_path / "small.pt"
  write_torch(small, {"model": state})
  rng = np.random.default_rng(0)
  wide = 300_000
  layers = [f"encoder.layers.{i}" for i in range(3)]
  for layer in (*layers, "decoder.layers.0", "decoder.layers.1"):
    for key, shape in (
      ("fc1.weight", (wide, 12)),
      ("fc1.bias", (wide,)),
      ("fc2.weight", (12, wide)),
      ("ffn_layernorm.weight", (wide,)),
      ("ffn_layernorm.bias", (wide,)),
    ):
      state[f"{layer}.{key}"] = rng.standard_normal(shape, np.float32)
  large = tmp_path / "large.pt"
  write_torch(large, {"model": state})
  peaks = []
  for path in (small, large):
    done = subprocess.run(
      [sys.executable, "-c", script, str(path), str(path.with_suffix(""))],
      capture_output=True,
      text=True,
      check=True,
      env={**os.environ, "XLA_FLAGS": ""},
    )
    peaks.append(int(done.stdout.split()[-1]))
  size = large.stat().st_size
  assert size > 150e6
  # With the 0.4 GB that any conversion takes, `base` in half precision (0.4 GB)
  # then stays below 2.5 times its size.
  assert peaks[1] - peaks[0] < 1.5 * size
