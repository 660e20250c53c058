"""The run folder: its config, its environment and what may resume in it."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict

from narvl_jax.errors import UserError, list_few
from narvl_jax.experiment.config import from_json, to_json
from narvl_jax.experiment.config_checks import check_types
from narvl_jax.experiment.config_table import may_change
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.files import paths as user_paths
from narvl_jax.files import side_files
from narvl_jax.files.disk import write_json, write_text
from narvl_jax.files.regular import read_regular
from narvl_jax.files.stores import as_path
from narvl_jax.run_folder import CONFIG_FILE

ENVIRONMENT_FILE = "environment.json"
SHARDING_FILE = "sharding.txt"
RESTORE_COMMAND = "python -m narvl_jax.checkpoints restore_config"

_PACKAGES = (
  "narvl_jax",
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
  "numpy",
)

# Network file systems may report a new file as absent for a while.
_PATIENCE_SECONDS = 60.0


def is_run(workdir: pathlib.Path) -> bool:
  """Returns whether the folder contains a run."""
  return (workdir / CONFIG_FILE).exists()


def check(workdir: pathlib.Path, config: Mapping[str, Any]) -> bool:
  """Returns whether the folder contains a run with this config.

  Settings that do not change the result, such as the mesh and the number of
  data workers, may differ.

  Raises:
    UserError: the folder cannot be written, or contains a run with another or
      an unknown config.
  """
  check_folder(workdir)
  if not is_run(workdir):
    # They would be mistaken for checkpoints of the new run.
    if any((workdir / "checkpoints").glob("*")):
      raise UserError(
        f"--workdir={workdir} contains checkpoints but no {CONFIG_FILE}, so"
        " what"
        f" they belong to is not known; use another --workdir"
        f"{_how_to_restore(workdir)}"
      )
    return False
  # `read_config` adds the defaults of newer settings.
  old = to_json(read_config(workdir))
  difference = {
    key: values
    for key, values in diff(old, to_json(config)).items()
    if not may_change(key, "resume")
  }
  if not difference:
    return True
  changes = [
    f"{key}: {before} -> {after}"
    for key, (before, after) in sorted(difference.items())
  ]
  advice = "use another --workdir, or the config of this run to resume it"
  if "train.steps" in difference:
    advice += " (the schedule follows train.steps, so it cannot be extended)"
  raise UserError(
    f"--workdir={workdir} contains a run with another config:"
    f" {list_few(changes, 8, '; ')}; {advice}"
  )


def check_folder(workdir: pathlib.Path) -> None:
  """Raises `UserError` unless the folder exists or can be created."""
  user_paths.check_folder("--workdir", workdir)


def diff(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[str, str]]:
  """Returns {dotted key: (old, new)} of the leaves that differ, as texts."""
  found = {}
  for key in {**old, **new}:
    before, after = old.get(key), new.get(key)
    path = f"{prefix}{key}"
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      found |= diff(before, after, f"{path}.")
    elif key not in old:
      found[path] = ("(absent)", _as_typed(after))
    elif key not in new:
      found[path] = (_as_typed(before), "(absent)")
    elif before != after:
      found[path] = (_as_typed(before), _as_typed(after))
  return found


def _as_typed(value: Any) -> str:
  """Returns a value as in --config.KEY=VALUE, as far as it can be typed."""
  match value:
    case None:
      return "(unset)"
    case "" | Mapping():
      return json.dumps(value)
    case list():
      return str(tuple(value))
    case _:
      return str(value)


def save_experiment(
  workdir: str | os.PathLike[str], experiment: Experiment
) -> None:
  """Writes vocabulary and config, which make a folder a run folder."""
  folder = as_path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  experiment.vocabulary.save(folder / VOCABULARY_FOLDER)
  # Last, since a folder with a config is a run.
  write_config(folder, experiment.config)


def write_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Writes `config.json`, which makes the folder a run folder."""
  write_json(workdir / CONFIG_FILE, to_json(config))


def write_sharding(workdir: pathlib.Path, table: str) -> None:
  """Writes `sharding.txt`, the placement of every parameter."""
  side_files.make_way(workdir / SHARDING_FILE)
  write_text(workdir / SHARDING_FILE, table + "\n")


def read_config(workdir: pathlib.Path) -> Any:
  """Returns the config of a run.

  Raises:
    UserError: the folder has no run.
  """
  if not is_run(workdir):
    raise UserError(
      f"--workdir={workdir} has no run: there is no {CONFIG_FILE}"
      f"{_how_to_restore(workdir, '; if it was lost, ')}"
    )
  path = workdir / CONFIG_FILE
  values = _read(path, _how_to_restore(workdir))
  try:
    check_types(values)
  except UserError as error:
    raise UserError(
      f"{path} cannot be used: {error}; use another --workdir"
      f"{_how_to_restore(workdir)}"
    ) from error
  return from_json(values)


def _how_to_restore(workdir: pathlib.Path, start: str = ", or ") -> str:
  """Returns advice about a damaged config; "" without checkpoints."""
  if not any((workdir / "checkpoints").glob("[0-9]*")):
    return ""
  return f"{start}write it again: {RESTORE_COMMAND} {workdir}"


def check_shared(
  workdir: pathlib.Path, host: str, *, patience: float = _PATIENCE_SECONDS
) -> None:
  """Checks that `host` sees the run that the first host has written.

  Raises:
    UserError: it does not within `patience` seconds.
  """
  deadline = time.monotonic() + patience
  while not is_run(workdir):
    if time.monotonic() > deadline:
      raise UserError(
        f"--workdir={workdir} on {host} is not the folder of host 0: there is"
        f" no {CONFIG_FILE}; use a --workdir that all hosts share"
      )
    time.sleep(min(0.5, patience))


def facts(config: Mapping[str, Any]) -> dict[str, str]:
  """Returns facts that must be equal on all hosts: config, versions, code.

  Returns:
    Names such as `config seed`, `version jax` and `code commit`, and values.
  """
  versions = {
    f"version {name}": version
    for name, version in _versions(("narvl_jax", "jax", "jaxlib")).items()
  }
  code = hashlib.sha256()
  package = pathlib.Path(__file__).parent.parent
  for path in sorted(package.rglob("*.py")):
    code.update(str(path.relative_to(package)).encode())
    code.update(path.read_bytes())
  settings = {
    f"config {key}": json.dumps(value)
    for key, value in flatten_dict(to_json(config), sep=".").items()
  }
  return {
    **settings,
    **versions,
    "code commit": str(_commit()),
    # Two hosts may have different changes on the same commit.
    "code files": code.hexdigest()[:12],
  }


def write_environment(workdir: pathlib.Path, resumed_step: int) -> None:
  """Writes `environment.json`: this start and the earlier ones."""
  path = workdir / ENVIRONMENT_FILE
  last = side_files.read_object(
    path, lambda x: isinstance(x.get("previous", []), list)
  )
  previous = [] if last is None else [*last.pop("previous", []), last]
  write_json(
    path, {**environment(), "step": resumed_step, "previous": previous}
  )


def environment() -> dict[str, Any]:
  """Returns versions, devices, command line and commit of this process."""
  devices = jax.devices()
  return {
    "started": datetime.datetime.now(datetime.UTC).isoformat(
      timespec="seconds"
    ),
    "command": sys.argv,
    "versions": _versions(_PACKAGES),
    "platform": platform.platform(),
    "devices": {
      "backend": jax.default_backend(),
      "kind": devices[0].device_kind,
      "count": len(devices),
      "processes": jax.process_count(),
    },
    "commit": _commit(),
  }


def _versions(packages: Iterable[str]) -> dict[str, str]:
  versions = {"python": platform.python_version()}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "unknown"
  return versions


def _commit() -> str | None:
  """Returns the commit of the code, with `+` for uncommitted changes."""
  folder = pathlib.Path(__file__).parent
  git = ["git", "-C", str(folder)]
  try:
    head = subprocess.run(
      [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    changed = subprocess.run(
      [*git, "status", "--porcelain", "--untracked-files=no"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
  return head + ("+" if changed else "")


def _read(path: pathlib.Path, advice: str = "") -> dict[str, Any]:
  try:
    values = json.loads(read_regular(path).decode("utf-8"))
    if not isinstance(values, dict):
      raise ValueError("it is not a JSON object")
    return values
  # ValueError: no JSON, or not even text. RecursionError: too deep.
  except (OSError, ValueError, RecursionError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
      f"{path} cannot be read ({reason}); use another --workdir{advice}"
    ) from error
