"""Traces of updates: when they start, what they contain, and failures."""

import pathlib
import signal
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.profiler import ProfileData

from narvl_jax.errors import UserError
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.config_table import KEYS, may_change
from narvl_jax.files.stores import as_path
from narvl_jax.reliability.ledger import Ledger
from narvl_jax.reliability.trace_request import TraceRequest
from narvl_jax.run.traces import Traces
from tests.run.fake_run import FakeRun, lines_of
from tests.support import small_run
from tests.support.tiny import tiny_config


def _traced(run: FakeRun, capsys: Any) -> list[str]:
  """Returns the updates of each trace that a run reports."""
  run.run()
  lines = capsys.readouterr().out.splitlines()
  return [
    line.split(": ")[0].removeprefix("trace of updates ")
    for line in lines
    if line.startswith("trace of")
  ]


def _run(workdir: pathlib.Path, **profile: Any) -> FakeRun:
  run = FakeRun(workdir, eval_every=4)
  run.config.profile.update(profile)
  return run


@pytest.fixture
def fake_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
  """A profiler that costs nothing and writes an empty trace."""
  folders = []

  def stop() -> None:
    path = pathlib.Path(folders.pop()) / "plugins/profile/x/vm.xplane.pb"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")

  monkeypatch.setattr(
    jax.profiler, "start_trace", lambda folder, **_: folders.append(folder)
  )
  monkeypatch.setattr(jax.profiler, "stop_trace", stop)


@pytest.mark.parametrize(
  ("profile", "updates"),
  [
    ({}, []),
    ({"steps": 3, "start_step": 2}, ["2 to 4"]),
    # Cut short by the end of the run.
    ({"steps": 2}, ["10 to 10"]),
    (
      {"steps": 2, "start_step": 1, "every": 4},
      ["1 to 2", "5 to 6", "9 to 10"],
    ),
    (
      {"steps": 3, "start_step": 3, "every": 3},
      ["3 to 5", "6 to 8", "9 to 10"],
    ),
  ],
)
@pytest.mark.usefixtures("fake_profiler")
def test_windows_of_the_config(tmp_path, capsys, profile, updates):
  assert _traced(_run(tmp_path, **profile), capsys) == updates
  folders = [f"step_{text.split()[0]}" for text in updates]
  assert sorted(folders) == sorted(
    path.name for path in (tmp_path / "traces").glob("*")
  )


@pytest.mark.usefixtures("fake_profiler")
def test_updates_count_from_the_start_of_the_process(tmp_path, capsys):
  run = _run(tmp_path, steps=1, start_step=2, dir=str(tmp_path / "other"))
  run.run(first=6)
  out = capsys.readouterr().out
  folder = tmp_path / "other" / "step_8"
  assert f"trace of updates 8 to 8: {folder}; open it with" in out
  assert f"xprof --logdir={folder} or tensorboard --logdir={folder}" in out
  assert (folder / "plugins/profile/step_8/host_000.xplane.pb").exists()


@pytest.mark.parametrize(
  ("text", "updates"), [("", "4 to 8"), ("3\n", "4 to 6"), ("x", "4 to 8")]
)
@pytest.mark.usefixtures("fake_profiler")
def test_a_file_requests_a_trace(tmp_path, capsys, text, updates):
  run = _run(tmp_path)
  before = run.train_step

  def train_step(state: Any, batch: int) -> Any:
    if state.step == 2:
      (tmp_path / "TRACE").write_text(text)
      run.trace.look()
      assert not (tmp_path / "TRACE").exists()
      run.trace.look()
    return before(state, batch)

  run.train_step = train_step
  assert _traced(run, capsys) == [updates]


@pytest.mark.usefixtures("fake_profiler")
def test_a_signal_requests_a_trace(tmp_path, capsys):
  run = _run(tmp_path, steps=2, start_step=100)
  before = run.train_step

  def train_step(state: Any, batch: int) -> Any:
    if state.step in (2, 6):
      signal.raise_signal(signal.SIGUSR1)
    return before(state, batch)

  run.train_step = train_step
  previous = signal.getsignal(signal.SIGUSR1)
  with run.trace:
    assert _traced(run, capsys) == ["4 to 5", "8 to 9"]
  assert signal.getsignal(signal.SIGUSR1) == previous


@pytest.mark.parametrize("where", ["start_trace", "stop_trace"])
@pytest.mark.usefixtures("fake_profiler")
def test_an_error_of_the_profiler_is_reported_once(
  tmp_path, capsys, monkeypatch, where
):
  def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("Profile has\nalready been started")

  monkeypatch.setattr(jax.profiler, where, fail)
  run = _run(tmp_path, steps=1, start_step=1, every=2)
  assert run.run().step == 10
  out = capsys.readouterr().out
  line = "note: no more traces: RuntimeError: Profile has already been started"
  assert out.count("note: no more traces") == out.count(line) == 1


@pytest.mark.usefixtures("fake_profiler")
def test_an_error_in_a_trace_keeps_its_stage(tmp_path, capsys):
  run = _run(tmp_path, steps=5, start_step=1)
  before = run.train_step

  def train_step(state: Any, batch: int) -> Any:
    if state.step == 3:
      raise MemoryError
    return before(state, batch)

  run.train_step = train_step
  with pytest.raises(MemoryError):
    run.run()
  assert run.ledger.status[:2] == ("step", 4)
  assert "trace of updates 1 to 3: " in capsys.readouterr().out


@pytest.mark.usefixtures("fake_profiler")
def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path, capsys):
  (tmp_path / "traces").write_text("a file")
  assert _run(tmp_path, steps=1).run().step == 10
  assert "note: no more traces: " in capsys.readouterr().out


# jax's type of the statistics lacks a module (Python 3.13).
@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")
def test_a_trace_has_the_stages_of_the_loop(tmp_path, capsys):
  run = _run(tmp_path, steps=3, start_step=3)
  before = run.train_step

  def train_step(state: Any, batch: int) -> Any:
    time.sleep(1e-3)
    return before(state, batch)

  run.train_step = train_step
  assert _traced(run, capsys) == ["3 to 5"]
  (path,) = (tmp_path / "traces/step_3").rglob("*.xplane.pb")
  data = ProfileData.from_file(str(path))
  events = [
    (event.name, dict(event.stats))
    for plane in data.planes
    for line in plane.lines
    for event in line.events
  ]
  names = {name for name, _ in events}
  assert {"train", "step", "data wait", "evaluation", "checkpoint"} <= names
  steps = [stats["step_num"] for name, stats in events if name == "train"]
  assert sorted(steps) == [3, 4, 5]


def test_a_request_is_served_once(tmp_path):
  request = TraceRequest(tmp_path)
  assert request.due() is None
  request.agreement.request(7)
  assert request.due() == 7
  assert request.due() is None


def test_a_traced_run_computes_the_same(tmp_path, capsys):
  settings: dict[str, Any] = {"train__steps": 3, "train__checkpoint_every": 3}
  plain = small_run.train(tmp_path / "plain", **settings)
  settings |= {"profile__steps": 2, "profile__start_step": 1}
  traced = small_run.train(tmp_path / "traced", **settings)
  assert "trace of updates 1 to 2: " in capsys.readouterr().out
  small_run.assert_equal(plain, traced)
  assert lines_of(tmp_path / "plain") != []
  losses = [
    [line["train/loss"] for line in lines_of(tmp_path / name)]
    for name in ("plain", "traced")
  ]
  assert losses[0] == losses[1]


def test_a_resumed_run_may_be_traced():
  keys = [key for key in KEYS if key.startswith(("profile.", "debug."))]
  assert len(keys) == 5
  assert all(may_change(key, "resume") for key in keys)


def test_traces_must_not_overlap():
  config = tiny_config()
  config.profile.update({"steps": 10, "every": 5})
  with pytest.raises(UserError, match=r"overlap: --config.profile.every=10"):
    validate(config)


@pytest.mark.usefixtures("fake_profiler")
def test_a_run_in_a_bucket(gcs, capsys):
  """Asked by a file there, it writes its trace there."""
  folder = as_path(f"{gcs.make_bucket()}/run")
  request = TraceRequest(folder)
  settings = SimpleNamespace(steps=1, start_step=99, every=0, dir="")
  traces = Traces(settings, folder, request, Ledger())
  (folder / "TRACE").write_text("2")
  request.look()
  assert not (folder / "TRACE").exists()
  for step in (1, 2, 3):
    traces.before(step, ())
    traces.after(step, ())
  assert f"trace of updates 1 to 2: {folder}/traces/step_1;" in (
    capsys.readouterr().out
  )
  name = "traces/step_1/plugins/profile/step_1/host_000.xplane.pb"
  assert (folder / name).exists()
