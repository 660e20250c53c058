"""Errors of a device that has too little memory: one line and a file."""

import functools
import pathlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from narvl_jax.errors import UserError
from narvl_jax.reliability.explain import describe_failure
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.run import out_of_memory
from narvl_jax.training.setup import Setup
from tests.support import runs, small_run


@functools.cache
def _setup() -> Setup:
  return runs.setup((2, 2, 1))


def _fail(
  workdir: pathlib.Path,
  stage: str,
  message: str,
  setup: Setup | None = None,
) -> str:
  """Returns the line about an error in a stage."""
  ledger = Ledger()
  ledger.progress(7)
  with (
    pytest.raises(UserError) as raised,
    out_of_memory.explained(setup or _setup(), workdir, ledger),
    ledger.stage(stage),
  ):
    raise jax.errors.JaxRuntimeError(message)
  code, line = describe_failure(raised.value, workdir)
  assert (code, line.count("\n")) == (2, 0)
  return line


def test_a_program_that_the_compiler_rejects(tmp_path):
  line = _fail(
    tmp_path,
    "compile",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G"
    " of 15.75G hbm.\nLargest program allocations: x",
  )
  file = tmp_path / "out_of_memory" / "host_000.txt"
  # Four rows a device; the state is small, so more shards do not help.
  assert line == (
    'error: out of memory in phase "compile" at step 7: the update needs 22.0'
    " GB a device, of 16.9 GB; try --config.train.accumulation_steps=2, then"
    " --config.model.remat=full, then --config.data.image_size='(24,24)';"
    f" largest arrays: {file}"
  )
  text = file.read_text()
  # All that the compiler says.
  assert "Largest program allocations: x" in text
  assert "arguments" in text
  assert "temporaries 22.0 GB" in text
  table = [row.split() for row in text.splitlines() if " params/" in row]
  # [3, 3, 64, 64], over two devices of fsdp.
  name = "params/encoder/stem/conv3/kernel"
  assert table[0] == ["73.7", "kB", "float32[3,3,32,64]", name]
  assert file.with_suffix(".prof").stat().st_size


@pytest.mark.parametrize(
  ("stage", "remedy"),
  [
    ("init", "--config.mesh.fsdp=4"),
    ("checkpoint", "--config.mesh.fsdp=4"),
    ("evaluation", "--config.evaluation.batch_size=4"),
    (
      "step",
      "--config.train.accumulation_steps=2, then --config.model.remat=full,"
      " then --config.mesh.fsdp=4, then --config.data.image_size='(24,24)'",
    ),
  ],
)
def test_the_stage_decides_what_to_change(tmp_path, stage, remedy):
  line = _fail(
    tmp_path, stage, "RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."
  )
  assert "an array or program of 4.1 kB could not be allocated" in line
  assert f"; try {remedy}; largest arrays: " in line


@pytest.mark.parametrize(
  ("message", "size"),
  [
    ("Out of memory while trying to allocate 16.50GiB.", "17.7 GB"),
    ("Failed to allocate request for 2.0MiB (2097152B) on device", None),
    ("Attempting to allocate 8.00G. That was not possible.", "8.6 GB"),
  ],
)
def test_sizes_in_messages_of_allocators(tmp_path, message, size):
  line = _fail(tmp_path, "step", f"RESOURCE_EXHAUSTED: {message}")
  assert (f"program of {size} could" if size else message) in line


def test_nothing_is_left_to_change(tmp_path):
  line = _fail(tmp_path, "init", "RESOURCE_EXHAUSTED: x", runs.setup((1, 4, 1)))
  assert ": RESOURCE_EXHAUSTED: x; try devices with more memory; " in line


def test_other_errors_pass(tmp_path):
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match="a bug"),
    out_of_memory.explained(_setup(), tmp_path, Ledger()),
  ):
    raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
  assert not (tmp_path / "out_of_memory").exists()


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path):
  (tmp_path / "out_of_memory").write_text("a file")
  line = _fail(tmp_path, "step", "RESOURCE_EXHAUSTED: x")
  assert "out of memory in phase" in line


def test_an_update_that_needs_terabytes(tmp_path, monkeypatch):
  """The error is that of the allocator, and the arrays have names."""

  def too_much(inputs: Any, state: Any, batch: Any) -> Any:
    length = batch["label_length"][0]
    with jax.named_scope("encoder"):
      # More than the address space, so that no system promises it.
      large = jnp.full(1 << 45, length, jnp.float32)
    return state, {"loss": large, "skipped": length}

  setup = small_run.setup(devices=1)
  with jax.set_mesh(setup.mesh):
    lowered = jax.jit(too_much).lower(
      setup.read_inputs(), setup.abstract_state, setup.batch
    )
    compiled = lowered.compile()
  monkeypatch.setattr(
    small_run.CachedSetup, "compile_step", lambda self: compiled
  )
  with pytest.raises(
    UserError, match=r'in phase "step" at step 1: .* TB could'
  ):
    small_run.train(tmp_path, devices=1)
  text = (tmp_path / "out_of_memory" / "host_000.txt").read_text()
  row = r"140\.7 TB +f32\[35184372088832\]  jit\(too_much\)/encoder/"
  assert re.search(row, text)
  assert re.search(r"55.3 kB +uint8\[8,48,48,3\] +batch/image", text)


def test_limit_of_the_device(tmp_path, monkeypatch):
  """A device that reports its memory, and a program that is too large."""
  device: Any = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10_000})
  setup: Any = SimpleNamespace(
    mesh=SimpleNamespace(local_devices=[device]),
  )
  analysis = SimpleNamespace(
    argument_size_in_bytes=6000,
    temp_size_in_bytes=7000,
    output_size_in_bytes=5000,
    alias_size_in_bytes=5000,
    generated_code_size_in_bytes=0,
  )
  program: Any = SimpleNamespace(memory_analysis=lambda: analysis)
  memory = out_of_memory._memory(setup, "RESOURCE_EXHAUSTED: x", program)
  assert memory is not None
  assert (memory.total, memory.limit) == (13_000, 10_000)
