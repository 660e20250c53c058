"""The sabotages apply, and their script reports whether they are detected."""

import pathlib

import pytest

from tests import sabotage as sabotage_lib
from tests.sabotage import ROOT, Sabotage
from tests.sabotage_list import SABOTAGES

_CODE = "def double(x):\n  return 2 * x\n"
_TESTS = """
from narvl_jax.code import double

def test_double():
  assert double(3) == 6

def test_type():
  double(3) + 1
"""


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda x: x.name)
def test_sabotage_applies(sabotage: Sabotage) -> None:
  text = sabotage.apply(ROOT)
  assert text != (ROOT / sabotage.file).read_text(encoding="utf-8")
  sabotage.check_test(ROOT)


def test_there_are_enough() -> None:
  assert len({sabotage.name for sabotage in SABOTAGES}) == len(SABOTAGES) >= 10


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
  """A tree of one module and its tests."""
  for folder in ("narvl_jax", "tests"):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "__init__.py").touch()
  (tmp_path / "narvl_jax" / "code.py").write_text(_CODE)
  (tmp_path / "tests" / "test_code.py").write_text(_TESTS)
  # The flag that all tests are given.
  (tmp_path / "tests" / "conftest.py").write_text(
    "def pytest_addoption(parser):\n"
    "  parser.addoption('--slow', action='store_true')\n"
  )
  return tmp_path


def make(new: str, test: str = "test_double", old: str = "") -> Sabotage:
  return Sabotage(
    new,
    "narvl_jax/code.py",
    old or "return 2 * x",
    new,
    f"tests/test_code.py::{test}",
  )


def rows(capsys: pytest.CaptureFixture[str]) -> list[str]:
  """Returns what was printed, without heading, seconds and names."""
  return [line[54:] for line in capsys.readouterr().out.splitlines()[1:]]


def test_a_noticed_one(
  tree: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert sabotage_lib.run(tree, [make("return 2 * x + 1")])
  before, after = rows(capsys)
  assert before == "passed"
  assert after.startswith("failed by an assertion: test_double: assert 7 == 6")
  assert (tree / "narvl_jax" / "code.py").read_text() == _CODE


def test_only_an_assertion_of_the_test_counts(
  tree: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  broken = {
    make("return x + 3"): "passed",
    make("return x.y"): "failed otherwise: test_double: AttributeError: 'int'",
    make("return None", "test_type"): "failed otherwise: test_type: TypeError",
    make("x", old="return 3 * x"): "failed otherwise: narvl_jax/code.py has"
    " this line 0 times, not once: return 3 * x",
    make("return ("): "failed otherwise: '(' was never closed",
  }
  assert not sabotage_lib.run(tree, list(broken))
  _, *found = rows(capsys)
  assert len(found) == len(broken)
  for line, text in zip(found, broken.values(), strict=True):
    assert line.startswith(text)


def test_tests_must_pass_without_sabotage(tree: pathlib.Path) -> None:
  (tree / "narvl_jax" / "code.py").write_text(_CODE.replace("2", "3"))
  assert not sabotage_lib.run(tree, [make("return x", old="return 3 * x")])


@pytest.mark.slow
def test_a_fault_without_end(
  tree: pathlib.Path,
  capsys: pytest.CaptureFixture[str],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.setattr(sabotage_lib, "_TIMEOUT", 5)
  endless = make("__import__('time').sleep(1000)")
  assert not sabotage_lib.run(tree, [endless, make("return x")])
  assert [row.split(":")[0] for row in rows(capsys)] == [
    "passed",
    "failed otherwise",
    "failed by an assertion",
  ]


def test_a_removed_test(tree: pathlib.Path) -> None:
  make("return x").check_test(tree)
  with pytest.raises(ValueError, match=r"there is no test .*::test_triple"):
    make("return x", "test_triple").check_test(tree)


@pytest.mark.slow
def test_every_sabotage_is_noticed() -> None:
  assert sabotage_lib.main([]) == 0


def test_unknown_names_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
  assert sabotage_lib.main(["nothing"]) == 2
  assert "no sabotage named nothing" in capsys.readouterr().err
