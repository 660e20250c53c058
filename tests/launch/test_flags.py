"""Flags, errors and dry runs, the same in all launch scripts."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.conftest import ROOT, TRAIN_ARGS, Launcher

TPU = (
  "--name=narvl",
  "--zone=us-west4-a",
  "--project=my-project",
  "--accelerator_type=v5litepod-16",
  "--version=v2-alpha-tpuv5-lite",
)
XPK = (
  "--cluster=my-cluster",
  "--workload=narvl",
  "--zone=us-west4-a",
  "--project=my-project",
  "--tpu_type=v5litepod-256",
)
IMAGE = "--docker_image=gcr.io/my-project/narvl_jax:latest"
REQUIRED = {
  "local.sh": ("--processes=2",),
  "tpu_vm.sh": TPU,
  "queued_resource.sh": TPU,
  "xpk.sh": (*XPK, IMAGE),
  "slurm.sh": ("--nodes=2",),
}
COMMON = [
  "log_dir",
  "retries",
  "backoff_seconds",
  "grace_seconds",
  "dry_run",
  "help",
]
DRY_RUNS = {
  "local": ("local.sh", "--processes=2", "--devices=4", "--port=12345"),
  "tpu_vm": (
    "tpu_vm.sh",
    *TPU,
    "--setup_command=sudo mount -t nfs 10.0.0.2:/share /mnt/shared",
    "--spot",
    "--delete",
  ),
  "queued_resource": ("queued_resource.sh", *TPU),
  "queued_resource_slices": ("queued_resource.sh", *TPU, "--num_slices=2"),
  "xpk": ("xpk.sh", *XPK, IMAGE, "--num_slices=2"),
  "xpk_base_image": ("xpk.sh", *XPK, "--base_docker_image=python:3.12"),
  "slurm_sbatch": (
    "slurm.sh",
    "--nodes=4",
    "--processes_per_node=8",
    "--gpus_per_node=8",
    "--time=24:00:00",
    "--partition=gpu",
    "--account=me",
    "--requeue",
  ),
  "slurm_srun": ("slurm.sh", "--mode=srun", "--nodes=4"),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_prints_the_commands_and_runs_none(
  name: str, launcher: Launcher, golden
):
  script, *flags = DRY_RUNS[name]
  result = launcher.run(script, *flags, "--dry_run")
  assert (result.returncode, result.stderr) == (0, "")
  golden(f"launch/{name}.txt", result.stdout)
  assert not (launcher.folder / "calls.jsonl").exists()
  assert not (launcher.root / "logs").exists()


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_needs_no_program(name: str, launcher: Launcher):
  for program in ("gcloud", "kubectl", "xpk", "srun", "sbatch"):
    (launcher.bin / program).unlink()
  script, *flags = DRY_RUNS[name]
  result = launcher.run(script, *flags, "--dry_run")
  assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", DRY_RUNS)
def test_dry_run_keeps_the_arguments_verbatim(name: str, launcher: Launcher):
  script, *flags = DRY_RUNS[name]
  result = launcher.run(script, *flags, "--dry_run")
  words = []
  for line in result.stdout.splitlines():
    if not line.startswith("#") and TRAIN_ARGS[0] in line:
      words += shlex.split(line)
  # Commands for another machine are one word, which its shell splits again.
  words += [
    inner
    for word in words
    if word.startswith(("--command=", "--wrap="))
    for inner in shlex.split(word.split("=", 1)[1])
  ]
  for argument in TRAIN_ARGS:
    assert argument in words


@pytest.mark.parametrize(
  ("name", "processes"), [("local", 2), ("tpu_vm", 2), ("slurm_srun", 4)]
)
def test_the_printed_commands_train_when_pasted(
  name: str, processes: int, launcher: Launcher
):
  script, *flags = DRY_RUNS[name]
  lines = launcher.run(script, *flags, "--dry_run").stdout
  launcher.plan(
    {"if": "networkEndpoints", "print": "2", "times": 9},
    {"if": "--command=sudo mount"},
  )
  subprocess.run(
    ["bash"],
    input=lines,
    cwd=launcher.root,
    env=launcher.environment,
    capture_output=True,
    text=True,
    check=True,
  )
  calls = launcher.calls("python")
  assert len(calls) == processes
  for call in calls:
    assert call[2 : 2 + len(TRAIN_ARGS)] == TRAIN_ARGS


@pytest.mark.parametrize("script", REQUIRED)
def test_help_has_the_common_flags_in_the_same_order(
  script: str, launcher: Launcher
):
  result = launcher.run(script, "--help")
  flags = re.findall(r"^  --(\w+)", result.stdout, re.MULTILINE)
  assert result.returncode == 0
  assert flags[-len(COMMON) :] == COMMON
  assert f"usage: launch/{script} [flags] -- --config=FILE.py" in result.stdout
  assert f"launch/{script} --" in result.stdout  # The example.


COMMANDS = [
  block
  for page in ("pods.md", "spot_run.md")
  for block in re.findall(
    r"```sh\n(launch/.*?)```",
    (ROOT / "docs" / page).read_text("utf-8"),
    re.DOTALL,
  )
  if "NAME.sh" not in block
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_documentation(command: str, launcher: Launcher):
  result = subprocess.run(
    [
      *("bash", "-euc"),
      re.sub(r"(launch/\w+\.sh) ", r"bash \1 --dry_run ", command, count=1),
    ],
    cwd=launcher.root,
    env=launcher.environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (result.returncode, result.stderr) == (0, "")
  assert "--config=configs/shapes.py" in result.stdout


def test_the_readme_has_a_command_for_each_script():
  scripts = {command.split()[0].split("/")[1] for command in COMMANDS}
  assert scripts == set(REQUIRED)


def error_of(launcher: Launcher, script: str, *flags: str, **kwargs) -> str:
  """Returns the one line that a mistake gives."""
  result = launcher.run(script, *flags, **kwargs)
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
  assert not (launcher.folder / "calls.jsonl").exists()
  return result.stderr.strip()


@pytest.mark.parametrize("script", REQUIRED)
def test_mistakes_in_any_script(script: str, launcher: Launcher):
  required = REQUIRED[script]
  error = error_of(launcher, script, *required, "--retires=2")
  assert error == (
    'error: unknown flag "--retires". Did you mean "--retries"?'
    " All flags: --help"
  )
  name = required[0].split("=")[0]
  error = error_of(launcher, script, *required[1:])
  assert error.startswith(f"error: flag {name} is required: ")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      ["--processes=two"],
      '--processes="two": not a whole number; nearest valid: --processes=1',
    ),
    (
      ["--processes=2", "--retries=-1"],
      '--retries="-1": not a whole number; nearest valid: --retries=0',
    ),
    (
      ["--processes=2", "--grace_seconds=2.5"],
      '--grace_seconds="2.5": not a whole number; nearest valid:'
      " --grace_seconds=2",
    ),
    (
      ["--processes=0"],
      '--processes="0": too small; nearest valid: --processes=1',
    ),
    (["--processes"], "flag --processes needs a value: --processes=VALUE"),
    (
      ["--processes=2", "--dry_run=maybe"],
      '--dry_run="maybe": neither true nor false; use --dry_run',
    ),
    (
      ["--processes=2", "--config.seed=1"],
      'unknown flag "--config.seed"; arguments of narvl_jax.train follow after'
      ' "--": launch/local.sh [flags] -- --config.seed=1',
    ),
    (
      ["--processes=2", "twice"],
      'unexpected argument "twice"; flags start with "--", arguments of'
      ' narvl_jax.train follow after "--"',
    ),
  ],
)
def test_mistakes_in_flags(flags: list[str], message: str, launcher: Launcher):
  assert error_of(launcher, "local.sh", *flags) == f"error: {message}"


@pytest.mark.parametrize("missing", ["config", "workdir"])
def test_train_arguments_are_needed(missing: str, launcher: Launcher):
  args = [a for a in TRAIN_ARGS if not a.startswith(f"--{missing}=")]
  error = error_of(launcher, "local.sh", "--processes=2", train_args=args)
  assert error == (
    f"error: no --{missing}=... among the arguments of narvl_jax.train; they"
    ' follow after "--": launch/local.sh [flags] -- --config=FILE.py'
    " --workdir=DIR"
  )


def test_mistakes_in_choices(launcher: Launcher):
  error = error_of(launcher, "xpk.sh", *XPK)
  assert error.startswith("error: flag --docker_image (or --base_docker_image)")
  error = error_of(launcher, "xpk.sh", *XPK, IMAGE, "--base_docker_image=a")
  assert error == (
    "error: --docker_image and --base_docker_image exclude each other"
  )
  error = error_of(launcher, "slurm.sh", "--nodes=1", "--mode=salloc")
  assert error == (
    'error: --mode="salloc": neither sbatch nor srun; use --mode=sbatch'
  )


@pytest.mark.parametrize(
  ("script", "program", "advice"),
  [
    ("tpu_vm.sh", "gcloud", "install the Google Cloud CLI: https://"),
    ("queued_resource.sh", "gcloud", "install the Google Cloud CLI: https://"),
    ("xpk.sh", "xpk", "install it: pip install xpk"),
    ("xpk.sh", "kubectl", "gcloud components install kubectl"),
    ("slurm.sh", "sbatch", "login nodes"),
    ("local.sh", "python", "install Python 3.11 or newer"),
  ],
)
def test_missing_programs(
  script: str, program: str, advice: str, launcher: Launcher
):
  (launcher.bin / program).unlink()
  error = error_of(launcher, script, *REQUIRED[script])
  assert error.startswith(f'error: no program "{program}" on the PATH; ')
  assert advice in error


def test_the_image():
  dockerfile = ROOT / "launch" / "Dockerfile"
  text = dockerfile.read_text("utf-8")
  sources = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
  copied = {name for line in sources for name in line.split()}
  ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text("utf-8")
  assert copied == set(re.findall(r"^!(\S+)$", ignored, re.MULTILINE))
  assert all((ROOT / name).exists() for name in copied)
  hadolint = shutil.which("hadolint", path=pathlib.Path(sys.executable).parent)
  if hadolint is None:
    pytest.skip("hadolint is absent")
  result = subprocess.run(
    [hadolint, dockerfile], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout


def test_shellcheck():
  # Beside Python, also where its environment is not activated.
  here = pathlib.Path(sys.executable).parent
  shellcheck = shutil.which("shellcheck", path=here) or shutil.which(
    "shellcheck"
  )
  if shellcheck is None:
    pytest.skip("shellcheck is absent")
  files = sorted((ROOT / "launch").rglob("*.sh"))
  assert len(files) >= 8
  result = subprocess.run(
    [shellcheck, *files], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout
