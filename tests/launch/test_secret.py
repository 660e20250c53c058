"""The secret that the processes of a run share, and who sees it."""

import pathlib

import pytest

from tests.launch.conftest import Launcher
from tests.launch.test_flags import IMAGE, TPU, XPK

_SCRIPTS = {
  "local.sh": ("--processes=2", "--port=12345"),
  "slurm.sh": ("--mode=srun", "--nodes=2"),
  "tpu_vm.sh": TPU,
  "queued_resource.sh": (*TPU, "--poll_seconds=1"),
  "xpk.sh": (*XPK, IMAGE),
}


def _launch(launcher: Launcher, script: str) -> tuple[list[str], str]:
  """Returns the secrets that processes were given, and what was printed."""
  launcher.plan(
    {"if": "describe & state", "print": "ACTIVE" if "que" in script else ""},
    {"if": "get jobset", "print": ""},
    {"if": "get pods", "print": "Running"},
    {"if": "get jobset", "print": "narvl Completed"},
  )
  result = launcher.run(script, *_SCRIPTS[script])
  assert result.returncode == 0, result.stdout + result.stderr
  found = launcher.secrets()
  assert len(found) == (1 if script == "xpk.sh" else 2)
  return [secret for _, secret in found], result.stdout + result.stderr


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("script", _SCRIPTS)
def test_all_processes_get_it_and_nobody_else(
  launcher: Launcher, script: str
) -> None:
  secrets, printed = _launch(launcher, script)
  (secret,) = set(secrets)
  assert len(secret) == 32
  int(secret, 16)
  assert secret not in printed
  # Command lines, which any user of the machine sees, are in `calls.jsonl`.
  holders = [
    path
    for path in _files(launcher.folder)
    if path.name not in _RECORDS and secret.encode() in path.read_bytes()
  ]
  assert {path.name for path in holders} <= {"launch_environment"}
  archives = list(launcher.root.glob("logs/*.tar.gz"))
  assert bool(holders) == bool(archives) == (script in _TPU_SCRIPTS)
  for path in (*holders, *archives):
    assert path.stat().st_mode & 0o077 == 0, path


# What the stand-ins were given.
_RECORDS = ("secrets.jsonl", "passed.jsonl")
_TPU_SCRIPTS = ("tpu_vm.sh", "queued_resource.sh")


@pytest.mark.parametrize("script", _SCRIPTS)
def test_that_of_the_user_is_kept(launcher: Launcher, script: str) -> None:
  launcher.environment["NARVL_CLUSTER_SECRET"] = "chosen by the user"
  secrets, _ = _launch(launcher, script)
  assert set(secrets) == {"chosen by the user"}


def test_each_launch_has_its_own(launcher: Launcher) -> None:
  for _ in range(2):
    launcher.run("local.sh", *_SCRIPTS["local.sh"])
  assert len({secret for _, secret in launcher.secrets()}) == 2


def test_xpk_receives_the_name_only(launcher: Launcher) -> None:
  _launch(launcher, "xpk.sh")
  assert launcher.log("environment") == (
    "NARVL_CLUSTER_SECRET\nNARVL_STOPPED_CODE=75\n"
  )
  (call,) = (x for x in launcher.calls("xpk") if "create" in x)
  assert "--env-file=logs/environment" in call


_KEYS = {
  "WANDB_API_KEY": "key of 'wandb'",
  "HF_TOKEN": "token $HOME \\ of hugging face",
  "AWS_SECRET_ACCESS_KEY": "secret/+=of aws",
  "JAX_COMPILATION_CACHE_DIR": "gs://my-bucket/cache",
}


@pytest.mark.parametrize("script", _SCRIPTS)
def test_keys_are_passed_on_and_never_shown(
  launcher: Launcher, script: str
) -> None:
  launcher.environment |= _KEYS
  _, printed = _launch(launcher, script)
  for given in launcher.passed():
    assert {name: given.get(name) for name in _KEYS} == _KEYS
  texts = [
    path.read_bytes()
    for path in _files(launcher.folder)
    if path.name not in (*_RECORDS, "launch_environment")
  ]
  for value in list(_KEYS.values())[:3]:
    assert value not in printed
    assert not any(value.encode() in text for text in texts)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh"])
def test_a_dry_run_shows_names_only(launcher: Launcher, script: str) -> None:
  key = "keys/key.json"
  launcher.environment |= _KEYS | {"GOOGLE_APPLICATION_CREDENTIALS": key}
  result = launcher.run(script, *_SCRIPTS[script], "--dry_run")
  assert result.returncode == 0, result.stderr
  for name, value in _KEYS.items():
    assert name in result.stdout
    assert value not in result.stdout
  assert "is not passed on; the hosts use their service account" in (
    result.stdout
  )
