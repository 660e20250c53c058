"""Compiling for TPUs that are not there, through the command."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from narvl_jax import compile_check
from narvl_jax.ahead_of_time import compile as aot
from narvl_jax.ahead_of_time import memory as memory_lib
from narvl_jax.ahead_of_time import report
from narvl_jax.ahead_of_time.costs import Line
from narvl_jax.ahead_of_time.hlo import Array
from narvl_jax.ahead_of_time.program import Collective, Program, read_program
from narvl_jax.ahead_of_time.topology import CHIPS, Topology
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.create import create
from narvl_jax.parallel import make_mesh
from narvl_jax.training.setup import Setup, build_setup
from tests.conftest import ROOT
from tests.support.terminal import without_progress
from tests.support.tiny import tiny_config

# A model that compiles in a moment, on the way of the large ones.
_SMALL = {
  "model.width": 128,
  "model.mlp_width": 256,
  "model.num_heads": 4,
  "model.encoder_layers": 1,
  "model.decoder_layers": 1,
  "model.image_encoder": "conv",
  "model.patch_size": 16,
  "model.remat": "none",
  "loss.chunk_size": 0,
  "data.image_size": "(64,64)",
  "data.max_text_length": 16,
  "train.batch_size": 256,
  "vocabulary.source": "train",
  "vocabulary.num_codes": 0,
  "vocabulary.size": 2000,
  "mesh.fsdp": 2,
  "mesh.tensor": 2,
}
# The compiler's least effort takes less than half of the time.
_LEAST_EFFORT = {
  "JAX_OPTIMIZATION_LEVEL": "O0",
  "JAX_MEMORY_FITTING_LEVEL": "O0",
  "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
}
_ROWS_A_CHIP = 128
# 4 x 4 image and 16 text tokens.
_SOURCE = 32
_KEYS = {
  "config",
  "topology",
  "num_slices",
  "chips",
  "mesh",
  "fits",
  "bytes_per_chip",
  "flops_per_chip",
  "collectives",
  "estimated_seconds",
  "hbm_bytes",
  "parts",
  "compile_seconds",
}


def _command(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.compile_check", *args],
    cwd=ROOT,
    env=os.environ | _LEAST_EFFORT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Any:
  """Output and figures of a small step on four chips."""
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu is not installed: pip install narvl_jax[aot]")
  path = tmp_path_factory.mktemp("aot") / "check.json"
  result = _command(
    "--config=configs/pod.py:base",
    "--topology=v5e:2x2",
    f"--json={path}",
    f"--hlo={path}.txt",
    *(f"--config.{key}={value}" for key, value in _SMALL.items()),
  )
  assert result.returncode == 0, result.stderr
  assert without_progress(result.stderr) == ""
  program = pathlib.Path(f"{path}.txt").read_text()
  return result.stdout, json.loads(path.read_text()), program


def test_figures_of_a_small_step(checked):
  found = checked[1]
  assert set(found) == _KEYS
  assert found["config"] == "configs/pod.py:base"
  assert (found["topology"], found["num_slices"]) == ("v5e:2x2", 1)
  assert found["chips"] == 4
  assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
  assert found["fits"] is True
  assert found["compile_seconds"] > 0


def test_bytes_of_a_small_step(checked):
  memory = checked[1]["bytes_per_chip"]
  # Parameters and two moments in float32, split over four chips, and pictures.
  table = 2048 * 128
  pictures = _ROWS_A_CHIP * 64 * 64 * 3
  assert memory["arguments"] > 3 * 4 * table // 4 + pictures
  assert memory["arguments"] + memory["temporaries"] <= memory["total"]
  assert memory["total"] < memory["limit"] == CHIPS["v5e"].hbm_bytes


def test_operations_of_a_small_step(checked):
  counts = checked[1]["flops_per_chip"]
  # Nothing is computed twice but position biases, and pictures have no
  # gradient.
  assert counts["compiler"] == pytest.approx(counts["formula"], rel=0.15)


def test_collectives_and_seconds_of_a_small_step(checked):
  found = checked[1]
  kinds = found["collectives"]
  assert kinds["all-gather"]["count"] > 0
  # Every weight travels once as it is needed: bfloat16, for a chip's heads.
  assert kinds["all-gather"]["bytes"] > 2 * 2048 * 128 // 2
  assert kinds["all-reduce"]["count"] > 0
  seconds = found["estimated_seconds"]
  assert seconds["compute"] > (
    found["flops_per_chip"]["compiler"] / CHIPS["v5e"].peak_flops
  )
  received = 2 * sum(kind["bytes"] for kind in kinds.values())
  assert 0 < seconds["communication"] <= received / 200e9


def test_report_of_a_small_step(checked):
  text = checked[0]
  assert "batch 256 = 2 x 128" in text
  assert "bfloat16 activations" in text
  assert "the compiler's estimate, not a measurement" in text
  assert "MFU            at most" in text
  assert "predict step, batch 128" in text


def test_parts_of_a_small_step(checked):
  found = {part["name"]: part for part in checked[1]["parts"]}
  # The stem is a convolution: there is no ResNet.
  assert {"encoder attention", "encoder FFN", "decoder", "loss head"} <= set(
    found
  )
  assert not any("ResNet" in name for name in found)
  whole = sum(sum(part["seconds"].values()) for part in found.values())
  assert whole == pytest.approx(checked[1]["estimated_seconds"]["compute"])
  assert found["encoder FFN"]["seconds"]["backward"] > 0
  assert found["optimizer"]["seconds"]["backward"] == 0
  bytes_ = sum(part["hbm_bytes"] for part in found.values())
  assert bytes_ == pytest.approx(checked[1]["hbm_bytes"])
  # Every step reads and writes the parameters and both moments.
  assert bytes_ > 2 * 3 * 4 * 2048 * 128 // 4
  assert "its largest instruction: " in checked[0]


def test_no_attention_weights_of_the_encoder_are_in_memory(checked):
  arrays = read_program(checked[2]).arrays
  squares = {
    name
    for array, names in arrays.items()
    for name in names
    if len(array.shape) > 3 and array.shape[-2:] == (_SOURCE, _SOURCE)
    if array.shape[0] == _ROWS_A_CHIP
  }
  # No logits, weights or gradients of them, and no bias of an example's own.
  assert not squares
  assert any(part["name"] == "encoder kernels" for part in checked[1]["parts"])


def test_topology_that_does_not_exist():
  result = _command("--config=configs/pod.py:base", "--topology=v5e:3x3")
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
  assert "v5e:3x3" in result.stderr
  assert "nearest: v5e:2x4" in result.stderr


def test_folder_that_does_not_exist():
  result = _command(
    "--config=configs/pod.py:base", "--topology=v5e:2x2", "--json=/no/x.json"
  )
  assert (result.returncode, result.stderr.count("\n")) == (2, 1)
  assert '--json="/no/x.json": there is no folder "/no"' in result.stderr


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G"
      " of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
      (20.5, 15.75),
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
      " for HLO temporaries (164.00G) exceeds available HBM (95.74G).",
      (164.0, 95.74),
    ),
  ],
)
def test_messages_of_the_compiler(message: str, needed: tuple[float, float]):
  found = memory_lib.needed_bytes(message)
  assert found == tuple(int(gib * 2**30) for gib in needed)


def test_other_messages_of_the_compiler():
  assert memory_lib.needed_bytes("INTERNAL: Used 20.50G of 15.75G hbm") is None
  assert memory_lib.needed_bytes("RESOURCE_EXHAUSTED: out of patience") is None


def _cpu_topology() -> Topology:
  return Topology("v5e:2x4", 1, CHIPS["v5e"], jax.devices())


def _failing(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
  def compile_step(self: Setup) -> None:
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(Setup, "compile_step", compile_step)


def _fsdp_config() -> Config:
  config = tiny_config()
  config.mesh.fsdp = 2
  config.train.batch_size = 64
  return config


def test_step_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
  _failing(
    monkeypatch,
    "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (20.00G)"
    " exceeds available HBM (15.75G).",
  )
  check = aot.check_train_step(_fsdp_config(), _cpu_topology())
  found = report.summary(check, "tiny")
  assert found["fits"] is False
  memory = found["bytes_per_chip"]
  assert memory["total"] == 20 * 2**30
  assert memory["arguments"] + memory["temporaries"] == memory["total"]
  assert memory["arguments"] > check.setup.state_bytes_per_device
  assert set(found) == _KEYS
  assert found["collectives"] == {}
  assert found["flops_per_chip"]["compiler"] is None
  seconds = found["estimated_seconds"]
  assert seconds == dict.fromkeys(("compute", "communication", "kernels"))
  text = report.format_report(check)
  # 8 rows a device took 20 GiB: 5 of them take less than 15.75 GiB.
  assert (
    "DOES NOT FIT   by 4.25 GiB; try --config.train.accumulation_steps=2, then"
    " --config.model.remat=full, then --config.data.image_size='(32,32)'"
  ) in text
  assert "mesh.fsdp" not in text


def test_state_that_does_not_fit(monkeypatch: pytest.MonkeyPatch):
  config = _fsdp_config()
  config.model.remat = "full"
  _failing(
    monkeypatch, "RESOURCE_EXHAUSTED: (8.00K) exceeds available HBM (4.00K)"
  )
  check = aot.check_train_step(config, _cpu_topology())
  # What is known of the arguments is more than what the compiler said.
  assert check.memory.temporaries == 0
  assert check.memory.limit == 4096
  flags_ = memory_lib.advice(check.setup, check.memory)
  assert "--config.mesh.fsdp=4" in flags_


def test_other_failures_of_the_compiler_pass(monkeypatch: pytest.MonkeyPatch):
  _failing(monkeypatch, "INTERNAL: a bug")
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    aot.check_train_step(_fsdp_config(), _cpu_topology())


class _Values(SimpleNamespace):
  """Values of the flags."""

  def __getitem__(self, name: str) -> Any:
    return getattr(self, name)


def test_exit_code_of_what_does_not_fit(
  monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
  _failing(
    monkeypatch, "RESOURCE_EXHAUSTED: (20.00G) exceeds available HBM (15.75G)"
  )
  monkeypatch.setattr(report, "get_topology", lambda *_: _cpu_topology())
  values = _Values(
    config=_fsdp_config(),
    json=str(tmp_path / "x.json"),
    topology="v5e:2x4",
    num_slices=1,
    hlo=None,
    predict=True,
  )
  monkeypatch.setattr(compile_check.flags, "FLAGS", values)
  monkeypatch.setattr(
    compile_check.config_flags, "get_config_filename", lambda _: "tiny"
  )
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  with pytest.raises(SystemExit) as stopped:
    compile_check.main([])
  assert stopped.value.code == compile_check.DOES_NOT_FIT_CODE == 3
  assert json.loads((tmp_path / "x.json").read_text())["fits"] is False


def test_activations_are_bfloat16_unless_said_otherwise(
  monkeypatch: pytest.MonkeyPatch,
):
  _failing(
    monkeypatch, "RESOURCE_EXHAUSTED: (20.00G) exceeds available HBM (15.75G)"
  )
  config = _fsdp_config()
  check = aot.check_train_step(config, _cpu_topology())
  assert check.setup.experiment.model_config.dtype.name == "bfloat16"
  assert config.model.dtype == "auto"
  config.model.dtype = "float32"
  check = aot.check_train_step(config, _cpu_topology())
  assert check.setup.experiment.model_config.dtype.name == "float32"


def _split_step(chip: str, num_slices: int) -> aot.Check:
  """A step with one all-reduce over all chips, on so many slices."""
  config = _fsdp_config()
  setup = build_setup(create(config, shapes_only=True), make_mesh(-1, 2))
  found = Collective(
    "all-reduce", (Array("f32", (1000,)),), 1, (tuple(range(8)),), ""
  )
  lines = (
    Line("f.1", "fusion", "f32[8]", "/encoder/ffn/mul", 1, 1e6, 1e9, 0.0),
    Line(
      "k.1", "custom-call", "", "/encoder/p", 2, 0.0, 0.0, 819e6, True, True
    ),
  )
  program = Program((found,), lines, {}, 8)
  where = Topology("2x2", num_slices, CHIPS[chip], jax.devices())
  memory = aot.Memory(1, 1, 2, 2**30)
  return aot.Check(setup, where, memory, program, 1.0)


def test_seconds_of_several_slices():
  one, two = _split_step("v5e", 1), _split_step("v5e", 2)
  assert one.network_bytes() == (2 * 7 / 8 * 4000, 0)
  assert one.communication_seconds == pytest.approx(7000 / 200e9)
  # A ring of four in each slice, then a quarter between two of them.
  assert two.network_bytes() == (2 * 3 / 4 * 4000, 2 / 2 * 1000)
  assert two.communication_seconds == pytest.approx(
    6000 / 200e9 + 1000 / (25e9 / 8)
  )
  assert "25 Gbit/s of a chip between slices" in report.format_report(two)


def test_seconds_without_a_published_bandwidth():
  check = _split_step("v6e", 2)
  assert check.communication_seconds is None
  assert (
    "unknown: no published bandwidth between slices"
    in report.format_report(check)
  )


def test_utilisation_of_a_step():
  check = _split_step("v5e", 1)
  # A kernel takes as long as its bytes.
  kernels = 819e6 / CHIPS["v5e"].hbm_bandwidth
  assert check.compute_seconds == pytest.approx(1e6 / 1.5e9 + kernels)
  text = report.format_report(check)
  assert "of it 1.0 ms are our estimate of 2 calls of Pallas kernels" in text
  assert "without the operations of k.1" in text
  assert check.formula_flops == check.setup.step_flops() / 8
  peak = check.formula_flops / CHIPS["v5e"].peak_flops
  assert check.utilisation(2 * peak) == pytest.approx(0.5)
