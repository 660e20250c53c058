"""Breaks one line of the code at a time and checks that a test detects it.

  python -m tests.sabotage [NAME ...]

Each entry of `tests/sabotage_list.py` is applied to a copy of the tree, where
its test must fail with an assertion; without it the test must pass. Prints a
table. Exits with 1 if a fault is not detected, if the test fails otherwise, or
if an entry no longer applies.
"""

import ast
import compileall
import dataclasses
import enum
import json
import os
import pathlib
import py_compile
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The parts of the tree that tests need.
_COPIED = ("narvl_jax", "tests", "configs", "pyproject.toml")
_TIMEOUT = 600
_BY_CONTENT = py_compile.PycInvalidationMode.CHECKED_HASH
_ENVIRONMENT = {
  # The bytecode cache does not notice two changes within a second.
  "PYTHONDONTWRITEBYTECODE": "1",
  # Plugins of installed packages, among them Hypothesis, load slowly.
  "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
}
# What takes long to import. The tests' settings come before jax.
_MODULES = (
  *("tests.conftest", "flax.linen", "grain", "hypothesis", "ml_collections"),
  *("optax", "orbax.checkpoint", "PIL.Image", "rich.console", "tokenizers"),
)
# Beginnings of pytest's messages for assertions, NumPy's and `pytest.raises`.
_ASSERTIONS = ("AssertionError", "assert ", "Failed: DID NOT RAISE")


@dataclasses.dataclass(frozen=True)
class Sabotage:
  """One changed line.

  Attributes:
    name: effect of the fault.
    file: path from the root.
    old: the original line without indentation; occurs once in the file.
    new: the replacement, which gets the same indentation.
    test: the test that must fail, `FILE::NAME`.
  """

  name: str
  file: str
  old: str
  new: str
  test: str

  def apply(self, root: pathlib.Path) -> str:
    """Returns the text of the file with the fault.

    Raises:
      ValueError: the line does not occur exactly once.
      SyntaxError: the result is not valid Python.
    """
    lines = (root / self.file).read_text(encoding="utf-8").splitlines()
    places = [i for i, line in enumerate(lines) if line.strip() == self.old]
    if len(places) != 1:
      raise ValueError(
        f"{self.file} has this line {len(places)} times, not once: {self.old}"
      )
    line = lines[places[0]]
    indent = line[: len(line) - len(line.lstrip())]
    lines[places[0]] = indent + self.new
    text = "\n".join(lines) + "\n"
    ast.parse(text)
    return text

  def check_test(self, root: pathlib.Path) -> None:
    """Checks that the test exists.

    Raises:
      ValueError: it does not.
    """
    file, _, name = self.test.partition("::")
    path = root / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    function = name.partition("[")[0]
    if not any(getattr(node, "name", None) == function for node in tree.body):
      raise ValueError(f"there is no test {self.test}")


class Outcome(enum.Enum):
  """The result of a test."""

  PASSED = "passed"
  ASSERTION = "failed by an assertion"
  OTHER = "failed otherwise"


def copy_tree(root: pathlib.Path, target: pathlib.Path) -> None:
  """Copies the parts of the tree that tests need."""
  ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
  for name in _COPIED:
    source = root / name
    if source.is_dir():
      shutil.copytree(source, target / name, ignore=ignored)
    elif source.exists():
      shutil.copy(source, target / name)


class Runner:
  """Runs tests of a tree, each time in a process with freshly imported code.

  The processes are forked from one that has imported the libraries.

  Args:
    root: the tree.
    modules: names of modules of libraries, or of the tree's tests, to import
      once.
  """

  def __init__(self, root: pathlib.Path, modules: Sequence[str] = ()) -> None:
    self._root = root
    program = pathlib.Path(__file__).parent / "programs" / "fork_pytest.py"
    self._process = subprocess.Popen(
      [sys.executable, str(program), str(_TIMEOUT), *modules],
      cwd=root,
      env=os.environ | _ENVIRONMENT,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def __enter__(self) -> "Runner":
    return self

  def __exit__(self, *_: object) -> None:
    self._process.communicate()

  def run(self, tests: Sequence[str]) -> tuple[Outcome, str]:
    """Runs tests of the tree.

    Returns:
      The outcome, and the message of the first failure on one line.
    """
    report = self._root / "report.xml"
    report.unlink(missing_ok=True)
    assert self._process.stdin is not None
    assert self._process.stdout is not None
    arguments = ["-q", "-x", "--slow", "-p", "no:cacheprovider"]
    arguments += [f"--junitxml={report}", *tests]
    print(json.dumps(arguments), file=self._process.stdin, flush=True)
    code = int(self._process.stdout.readline() or 1)
    if code == -signal.SIGALRM:
      return Outcome.OTHER, f"it took longer than {_TIMEOUT} s"
    if not report.exists():
      output = self._root / "output.txt"
      lines = output.read_text().split("\n") if output.exists() else []
      lines = [line for line in lines if line.strip()]
      return Outcome.OTHER, lines[-1] if lines else f"pytest ended with {code}"
    return _outcome(report, code)


def _outcome(report: pathlib.Path, code: int) -> tuple[Outcome, str]:
  cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
  for case in cases:
    for kind in ("failure", "error", "skipped"):
      found = case.find(kind)
      if found is None:
        continue
      message = found.get("message", "")
      assertion = kind == "failure" and message.startswith(_ASSERTIONS)
      outcome = Outcome.ASSERTION if assertion else Outcome.OTHER
      return outcome, " ".join(f"{case.get('name')}: {message}".split())
  if code or not cases:
    return Outcome.OTHER, f"pytest ended with code {code}"
  return Outcome.PASSED, ""


def run(
  root: pathlib.Path,
  sabotages: Sequence[Sabotage],
  modules: Sequence[str] = (),
) -> bool:
  """Applies each sabotage and prints a table.

  Args:
    root: the tree, of which a copy is changed.
    sabotages: what is applied, one at a time.
    modules: modules that the tests' processes share.

  Returns:
    Whether all were detected.
  """
  noticed = True
  print(f"{'sabotage':<44} {'seconds':>7}  what the test says", flush=True)
  with tempfile.TemporaryDirectory(prefix="sabotage") as folder:
    copy = pathlib.Path(folder)
    copy_tree(root, copy)
    # Files of the bytecode cache that are compared by content, not by time.
    compileall.compile_dir(copy, quiet=2, invalidation_mode=_BY_CONTENT)
    with Runner(copy, modules) as runner:
      start = time.monotonic()
      tests = sorted({sabotage.test for sabotage in sabotages})
      outcome, message = runner.run(tests)
      _print_row("(none)", start, outcome, message)
      if outcome is not Outcome.PASSED:
        return False
      for sabotage in sabotages:
        start = time.monotonic()
        outcome, message = _run_sabotaged(copy, sabotage, runner)
        noticed &= outcome is Outcome.ASSERTION
        _print_row(sabotage.name, start, outcome, message)
  return noticed


def _run_sabotaged(
  copy: pathlib.Path, sabotage: Sabotage, runner: Runner
) -> tuple[Outcome, str]:
  file = copy / sabotage.file
  before = file.read_text(encoding="utf-8")
  try:
    file.write_text(sabotage.apply(copy), encoding="utf-8")
    return runner.run([sabotage.test])
  except (ValueError, SyntaxError) as error:
    return Outcome.OTHER, str(error)
  finally:
    file.write_text(before, encoding="utf-8")


def _print_row(name: str, start: float, outcome: Outcome, text: str) -> None:
  seconds = time.monotonic() - start
  ends = f"{outcome.value}: {text}" if text else outcome.value
  print(f"{name:<44} {seconds:7.1f}  {ends[:160]}", flush=True)


def main(names: Sequence[str]) -> int:
  """Runs the named sabotages, or all; returns the exit code."""
  from tests.sabotage_list import SABOTAGES

  unknown = set(names) - {sabotage.name for sabotage in SABOTAGES}
  if unknown:
    print(f"no sabotage named {', '.join(sorted(unknown))}", file=sys.stderr)
    return 2
  chosen = [x for x in SABOTAGES if not names or x.name in names]
  return 0 if run(ROOT, chosen, _MODULES) else 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
