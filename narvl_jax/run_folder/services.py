"""Tracking services: Weights & Biases and trackio."""

import contextlib
import importlib
import io
import os
import pathlib
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from narvl_jax.experiment.config import to_json
from narvl_jax.files import side_files
from narvl_jax.files.disk import write_json
from narvl_jax.files.stores import is_remote
from narvl_jax.terminal.text import brief, show, warn

TRACKERS_FILE = "trackers.json"
# A run must not wait for long where there is no network.
_TIMEOUT_SECONDS = 60
_LONGEST_REASON = 200
# Between two writes of the last step into a store, which take requests.
_STORE_SECONDS = 30.0


class _Client(Protocol):
  """A tracked run of a service; `place` is where it is shown."""

  place: str

  def log(self, step: int, values: Mapping[str, Any]) -> None: ...

  def close(self, failed: bool) -> None: ...


class _Wandb:
  def __init__(
    self, run_id: str, name: str, workdir: pathlib.Path, config: Any
  ) -> None:
    wandb = importlib.import_module("wandb")
    folder = os.environ.get("WANDB_DIR") or (
      tempfile.mkdtemp() if is_remote(workdir) else str(workdir)
    )
    self._run = wandb.init(
      project=config["tracking"]["project"],
      name=name,
      id=run_id,
      resume="allow",
      dir=folder,
      config=to_json(config),
      # Silent: it never prompts for a key.
      settings=wandb.Settings(
        console="off",
        silent=True,
        init_timeout=_TIMEOUT_SECONDS,
        finish_timeout=_TIMEOUT_SECONDS,
      ),
    )
    self._run.define_metric("*", step_metric="step")
    online = self._run.settings.mode in ("online", "shared")
    self.place = str(self._run.url if online else self._run.dir)

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    # Its own step never decreases, also over resumed runs.
    row = max(step, self._run.step)
    self._run.log({**values, "step": step}, step=row)

  def close(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class _Trackio:
  def __init__(
    self, run_id: str, name: str, workdir: pathlib.Path, config: Any
  ) -> None:
    self._trackio = importlib.import_module("trackio")
    project = config["tracking"]["project"]
    # It resumes runs by name.
    name = f"{name}-{run_id}"
    self._run = self._trackio.init(
      project=project,
      name=name,
      resume="allow",
      config=to_json(config),
      embed=False,
    )
    self.place = f"project {project}, run {name}"

  def log(self, step: int, values: Mapping[str, Any]) -> None:
    self._run.log(dict(values), step=step)

  def close(self, failed: bool) -> None:
    self._trackio.finish()


SERVICES: dict[str, Callable[..., _Client]] = {
  "wandb": _Wandb,
  "trackio": _Trackio,
}


class Service:
  """A tracked run; a failure of the service is one warning.

  `trackers.json` in the run folder contains the id of the tracked run, which a
  resumed run continues, and the last step that was sent. Points cannot be
  removed from a service, so steps that a restart or a rollback repeats are not
  sent again.
  """

  def __init__(
    self, service: str, workdir: pathlib.Path, config: Mapping[str, Any]
  ) -> None:
    self._service = service
    self._file = workdir / TRACKERS_FILE
    self._client: _Client | None = None
    self._id = uuid.uuid4().hex[:8]
    self._step, self._saved = -1, 0.0
    # Names of the values of that step that were sent.
    self._sent: set[str] = set()
    self._attempt(lambda: self._open(workdir, config))

  def _open(self, workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
    stored = (side_files.read_object(self._file) or {}).get(self._service)
    if isinstance(stored, dict):
      self._id, self._step = str(stored["id"]), int(stored["step"])
      self._sent = set(stored["sent"])
    # Before it is opened, so that a killed run is continued.
    self._save()
    name = config["tracking"]["name"] or workdir.resolve().name
    with contextlib.redirect_stdout(io.StringIO()):
      self._client = SERVICES[self._service](self._id, name, workdir, config)
    show(f"{self._service} tracks the run: {self._client.place}")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Sends the values that were not sent before."""
    if step < self._step:
      return
    if step > self._step:
      self._step, self._sent = step, set()
    new = {k: v for k, v in values.items() if k not in self._sent}
    self._sent |= new.keys()
    client = self._client
    if new and client is not None:
      self._attempt(lambda: client.log(step, new))

  def write_image(self, step: int, name: str, path: pathlib.Path) -> None:
    """Sends a picture."""

    def send() -> None:
      import PIL.Image

      image = PIL.Image.open(io.BytesIO(path.read_bytes()))
      module = importlib.import_module(self._service)
      self.write(step, {name: module.Image(image)})

    if self._client is not None:
      self._attempt(send)

  def go_back(self, step: int) -> None:
    """Does nothing: steps that were sent are not sent again."""

  def flush(self) -> None:
    """Records the last step that was sent; threads of the service send it."""
    wait = _STORE_SECONDS if is_remote(self._file) else 0.0
    if self._client is not None and time.monotonic() >= self._saved + wait:
      # After a kill, some steps would be sent twice.
      with contextlib.suppress(OSError):
        self._save()

  def close(self, failed: bool) -> None:
    """Waits up to a minute until everything is sent."""
    client = self._client
    if client is not None:
      with contextlib.suppress(OSError):
        self._save()
      with contextlib.redirect_stdout(io.StringIO()):
        self._attempt(lambda: client.close(failed))
      self._client = None

  def _save(self) -> None:
    self._saved = time.monotonic()
    everything = side_files.read_object(self._file) or {}
    own = {"id": self._id, "step": self._step, "sent": sorted(self._sent)}
    if everything.get(self._service) != own:
      write_json(self._file, {**everything, self._service: own})

  def _attempt(self, action: Callable[[], Any]) -> None:
    """Calls `action`; its error ends the tracking with one warning."""
    try:
      action()
    except Exception as error:
      self._client = None
      reason = brief(" ".join(f"{error}".split()), _LONGEST_REASON)
      warn(
        f"{self._service} failed ({type(error).__name__}: {reason}); the run"
        " continues without it"
      )
