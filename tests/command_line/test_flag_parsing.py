"""Flags of all commands: their names, their help, and how they are typed."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from absl import flags

from narvl_jax.command_line import cli, json_output
from narvl_jax.command_line import flag_parsing as cli_flags
from narvl_jax.command_line import flags as common_flags
from narvl_jax.command_line import messages as cli_messages
from narvl_jax.errors import UserError
from tests.conftest import ROOT

COMMANDS = (
  *("train", "evaluate", "predict", "distill", "convert", "compare"),
  *("calibrate", "compile_check", "checkpoints", "check_data", "convert_data"),
  *("list_answers", "benchmarks.data", "benchmarks.checkpoints"),
  *("benchmarks.loss_head", "benchmarks.query_ctc", "benchmarks.twins"),
  *("benchmarks.reference", "benchmarks.trace"),
  *("significance", "submission", "document_frequencies", "inspect", "report"),
  "status",
)
# Old name -> new name, by command.
_RENAMED = {
  "distill": {"workdir": "teacher", "examples_per_shard": "shard_size"},
  "compare": {"batch_sizes": "batch_size"},
  "checkpoints": {"step": "checkpoint", "steps": "checkpoint"},
  "check_data": {"threads": "num_threads"},
  "convert_data": {"limit": "max_examples", "workers": "num_workers"},
  "list_answers": {"max_records": "max_examples"},
  "benchmarks.data": {
    "batch": "batch_size",
    "examples": "max_examples",
    "workers": "num_workers",
  },
  "benchmarks.loss_head": {"batch": "batch_size"},
  "benchmarks.query_ctc": {"batch": "batch_size"},
  "benchmarks.twins": {"labels": "max_examples"},
}
# Several commands take lists where the others take one.
_LISTS = {("checkpoints", "checkpoint"), ("compare", "batch_size")}
_LISTS |= {("benchmarks.data", "num_workers")}
_LISTS |= {("benchmarks.reference", "size")}


@pytest.fixture
def define(monkeypatch) -> Iterator[Callable[[str], object]]:
  """Returns a function that defines the flags of a command, until the end."""
  before = set(flags.FLAGS)
  monkeypatch.setattr(common_flags, "RENAMED", {})
  monkeypatch.setattr(cli_flags, "RENAMED", common_flags.RENAMED)
  monkeypatch.setattr(sys, "argv", ["command"])

  def define(command: str) -> object:
    module = importlib.import_module(f"narvl_jax.{command}")
    module.define_flags()
    return module

  yield define
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)


def test_every_command_is_tested():
  found = {
    ".".join(path.relative_to(ROOT / "narvl_jax").with_suffix("").parts)
    for path in (ROOT / "narvl_jax").rglob("*.py")
    if "cli.run(" in path.read_text()
  }
  assert found == {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_own_flags_only(command, define, capsys):
  module = define(command)
  assert cli_flags.print_help(module.main, ["x", "--help"])
  text = capsys.readouterr().out
  assert text.startswith(module.__doc__.strip().splitlines()[0])
  assert text.endswith("--helpfull lists the flags of libraries as well.\n")
  shown = set(re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE))
  assert shown == {flag.name for flag in cli_flags.own_flags()}
  libraries = ("verbosity", "alsologtostderr", "jax_", "pytest", "only_check")
  assert not [name for name in shown if name.startswith(libraries)]
  # Whoever reads on finds no name that is no more.
  for old in _RENAMED.get(command, {}):
    assert f"--{old}=" not in text
  assert max(map(len, text.splitlines())) <= 80
  assert ("--config.train.steps=100" in text) == ("config" in shown)
  assert not cli_flags.print_help(module.main, ["x", "--", "--help"])


@pytest.mark.parametrize("command", ["train", "predict"])
def test_golden_help(command, define, capsys, golden):
  module = define(command)
  cli_flags.print_help(module.main, ["x", "-h"])
  golden(f"help/{command}.txt", capsys.readouterr().out)


@pytest.mark.parametrize("form", ["--help", "-h", "--helpfull"])
def test_help_ends_with_code_0(form):
  """In a process of its own, also beside flags that are wrong."""
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.list_answers", "--to=x", form],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0
  assert result.stderr == ""
  assert "--max_examples" in result.stdout
  assert ("--verbosity" in result.stdout) == (form == "--helpfull")


def test_names_have_one_meaning(define):
  """A flag of a name is of the same type in all commands."""
  kinds: dict[str, set[str]] = {}
  for command in COMMANDS:
    before = set(flags.FLAGS)
    define(command)
    for flag in cli_flags.own_flags():
      assert flag.name not in _RENAMED.get(command, {})
      if (command, flag.name) not in _LISTS:
        kinds.setdefault(flag.name, set()).add(flag.parser.flag_type())
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
  assert {name: kind for name, kind in kinds.items() if len(kind) > 1} == {}
  retired = {old for names in _RENAMED.values() for old in names}
  # These mean something else in other commands.
  assert retired & set(kinds) == {"labels", "steps", "workdir"}


@pytest.mark.parametrize(
  ("command", "old", "new"),
  [
    (command, old, new)
    for command, names in _RENAMED.items()
    for old, new in names.items()
  ],
)
def test_old_names_work_with_a_note(command, old, new, define, capsys):
  define(command)
  for form in ([f"--{old}=3"], [f"-{old}", "3"], [f"--{old}", "3"]):
    argv = cli_flags.normalise(["x", *form, "--other=1"])
    dashes = form[0].partition(old)[0]
    assert argv[1] == form[0].replace(f"{dashes}{old}", f"{dashes}{new}")
    assert argv[2:] == [*form[1:], "--other=1"]
    assert capsys.readouterr().err == f"note: --{old} is now called --{new}\n"
  assert new in flags.FLAGS
  assert cli_flags.normalise(["x", "--", f"--{old}=3"])[2] == f"--{old}=3"


@pytest.mark.parametrize(
  ("given", "expected"),
  [
    (["--config.a.b", "2"], ["--config.a.b=2"]),
    (["--config.a.b", "-1"], ["--config.a.b=-1"]),
    (["--config.a.b", "(1,2)"], ["--config.a.b=(1,2)"]),
    (["--config.a.b", "false", "x"], ["--config.a.b=false", "x"]),
    # A switch, and what the command is given.
    (["--config.a.b", "name"], ["--config.a.b", "name"]),
    (["--config.a.b", "--dry_run"], ["--config.a.b", "--dry_run"]),
    (["--dry_run", "false"], ["--dry_run=false"]),
    (["--dry_run", "runs/x"], ["--dry_run", "runs/x"]),
    (["--workdir", "runs/x"], ["--workdir", "runs/x"]),
    (["--json", "x.json"], ["--json=x.json"]),
    (["--json", "x"], ["--json", "x"]),
    (["--nodry_run"], ["--nodry_run"]),
    (["--prompt=a\nb"], ["--prompt=a\nb"]),
  ],
)
def test_forms(given, expected, define):
  define("train")
  assert cli_flags.normalise(["x", *given]) == ["x", *expected]


@pytest.mark.parametrize(
  ("given", "value"),
  [("true", True), ("false", False), ("compile", "compile")],
)
def test_dry_run_may_compile(given, value, define):
  define("train")
  assert flags.FLAGS["dry_run"].boolean
  flags.FLAGS["dry_run"].parse(given)
  assert flags.FLAGS["dry_run"].value == value
  with pytest.raises(flags.IllegalFlagValueError, match="Non-boolean"):
    flags.FLAGS["dry_run"].parse("maybe")


@pytest.mark.parametrize(
  ("name", "near"),
  [
    ("lr", ["config.optimizer.learning_rate"]),
    ("learning_rate", ["config.optimizer.learning_rate"]),
    ("learning-rate", ["config.optimizer.learning_rate"]),
    ("bs", ["config.train.batch_size", "config.evaluation.batch_size"]),
    ("batch_size", ["config.train.batch_size", "config.evaluation.batch_size"]),
    ("config.batch_size", ["config.train.batch_size"]),
    ("epochs", ["config.train.steps"]),
    ("wd", ["config.optimizer.weight_decay"]),
    ("train.steps", ["config.train.steps"]),
    ("work_dir", ["workdir"]),
    ("output_dir", ["workdir"]),
    ("dry-run", ["dry_run"]),
    ("num_examples", ["config.evaluation.max_examples"]),
    ("xyzzy", []),
  ],
)
def test_suggestions_for_a_name(name, near, define):
  define("train")
  config = f"--config={ROOT / 'configs' / 'shapes.py'}"
  assert cli_messages.near_flags(name, ["x", config])[: len(near) or 9] == near
  # Without a config those of the defaults.
  assert cli_messages.near_flags(name, ["x"])[: len(near) or 9] == near


def test_keys_belong_to_commands_with_a_config_only(define):
  define("predict")
  assert cli_messages.near_flags("lr", ["x"]) == []
  assert cli_messages.near_flags("bs", ["x"]) == ["beam_size"]


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["steps=3"], 'start with "--". Did you mean "--config.train.steps=3"?'),
    (["x", "-dry_run", "1"], 'value after "=": --dry_run=1'),
    (["x", "shapes.py:quick"], 'Did you mean "--config=shapes.py:quick"?'),
    (["x", "."], 'Did you mean "--workdir=."?'),
    (["x", "what"], 'unexpected argument "what"; flags start with "--"'),
  ],
)
def test_unexpected_arguments(argv, message, define):
  define("train")
  found = cli_messages.unexpected_argument(argv[-1], argv)
  assert found.startswith(f'unexpected argument "{argv[-1]}"; ')
  assert found.endswith(message)


@pytest.mark.parametrize(
  ("argument", "value"),
  [
    ([], None),
    (["--json"], "-"),
    (["--json=-"], "-"),
    (["--json=x.json"], "x.json"),
    (["--nojson"], None),
    (["--json="], None),
  ],
)
def test_output_for_programs(argument, value, define):
  define("check_data")
  parsed = flags.FLAGS(["x", *argument])
  assert parsed == ["x"]
  assert flags.FLAGS.json == value


def test_json_has_stdout_for_itself(capsys):
  with json_output.reserved_stdout("-"):
    print("for people")
    json_output.write_report("-", {"a": "\x1b"}, indent=None)
  captured = capsys.readouterr()
  assert captured.out == '{"a": "\\u001b"}\n'
  assert captured.err == "for people\n"


def test_json_goes_to_a_file(tmp_path, capsys):
  path = tmp_path / "x.json"
  with json_output.reserved_stdout(str(path)):
    print("for people")
    json_output.write_report(str(path), {"a": 1})
  assert json.loads(path.read_text()) == {"a": 1}
  assert capsys.readouterr().out == "for people\n"
  json_output.write_report(None, {})
  with pytest.raises(UserError, match=r'--json=".*" is a folder; give a file'):
    json_output.check_json_path(str(tmp_path))
  with pytest.raises(UserError, match=r"there is no folder .*; create it"):
    json_output.check_json_path(str(tmp_path / "no" / "x"))


def test_a_required_flag_without_its_name(define, capsys):
  define("evaluate")
  with pytest.raises(SystemExit):
    cli._parse_flags(["x", ".", "--split=test"])
  assert capsys.readouterr().err == (
    'error: flag --workdir is required; unexpected argument "."; flags start'
    ' with "--". Did you mean "--workdir=."?\n'
  )
  with pytest.raises(SystemExit):
    cli._parse_flags(["x", "--limit=3", "--workdir=."])
  assert capsys.readouterr().err == (
    'error: unknown flag "--limit". Did you mean "--max_examples"?\n'
  )


def test_unknown_flags_name_the_nearest(define, capsys):
  define("train")
  with pytest.raises(SystemExit) as error:
    cli._parse_flags(["x", "--lr=3"])
  assert error.value.code == 2
  assert capsys.readouterr().err == (
    'error: unknown flag "--lr". Did you mean'
    ' "--config.optimizer.learning_rate"?\n'
  )
  with pytest.raises(SystemExit):
    cli._parse_flags(["x", "--xyzzy"])
  assert capsys.readouterr().err == (
    'error: unknown flag "--xyzzy". --help lists the flags of this command\n'
  )
