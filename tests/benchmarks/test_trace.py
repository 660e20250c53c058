"""A trace of the real update has the names of the model."""

import pathlib
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from narvl_jax.benchmarks.trace import format_report, main, seconds_by_part
from narvl_jax.errors import UserError
from narvl_jax.parallel import shard_batch
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.trace_request import TraceRequest
from narvl_jax.run.traces import Traces
from tests.support import runs

# jax leaves the names out of the keys of its cache: a program that was cached
# has the names of the code that compiled it.
_KEY = "jax_compilation_cache_include_metadata_in_key"


@pytest.fixture(scope="module")
def traced(
  tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pathlib.Path, str]:
  """Returns the folder of a trace of one update, and its program."""
  assert not getattr(jax.config, _KEY)
  jax.config.update(_KEY, True)
  try:
    setup = runs.setup(
      model__encoder_layers=1,
      model__decoder_layers=1,
      model__image_encoder="resnet",
      optimizer__ema_decay=0.9,
    )
    step = setup.compile_step()
  finally:
    jax.config.update(_KEY, False)
  state = setup.init(jax.random.key(0))
  batch = shard_batch(runs.host_batch(0), setup.mesh)
  settings = SimpleNamespace(steps=1, start_step=1, every=0, dir="")
  folder = tmp_path_factory.mktemp("run")
  traces = Traces(settings, folder, TraceRequest(folder), Ledger())
  traces.before(1, ())
  _, metrics = step(setup.read_inputs(), state, batch)
  traces.after(1, metrics)
  return folder / "traces" / "step_1", step.as_text() or ""


def test_parts_of_a_traced_update(traced: tuple[pathlib.Path, str]) -> None:
  folder, program = traced
  (path,) = folder.rglob("*.xplane.pb")
  seconds = seconds_by_part(path.read_bytes(), program)
  names = {
    *("ResNet convolutions", "ResNet BatchNorm", "encoder attention"),
    *("encoder projections", "encoder FFN", "encoder layer norms", "decoder"),
    *("loss head", "metrics", "optimizer", "moving averages"),
  }
  assert names <= set(seconds)
  assert all(seconds.values())
  assert "loss head" in format_report({"seconds": seconds})


@pytest.mark.parametrize("missing", ["trace", "operations"])
def test_errors(
  traced: tuple[pathlib.Path, str],
  tmp_path: pathlib.Path,
  monkeypatch: pytest.MonkeyPatch,
  missing: str,
) -> None:
  program = tmp_path / "program.txt"
  program.write_text("ENTRY %main (x: f32[]) -> f32[] {\n}\n")
  folder = tmp_path if missing == "trace" else traced[0]
  values: Any = {"from": SimpleNamespace(value=str(folder))}

  class Flags(dict):
    hlo, json = str(program), None

  monkeypatch.setattr("absl.flags.FLAGS", Flags(values))
  match = "has no trace" if missing == "trace" else "has no operation of --hlo"
  with pytest.raises(UserError, match=match):
    main([])
