"""Sizes of folders, files and functions; circles of imports."""

import ast
import graphlib
import pathlib

import grimp
import pytest

from tests.conftest import ROOT

_FOLDERS = ("narvl_jax", "configs", "tests", "docs")
_MODULES = sorted(
  path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.py")
)
_MOST_FILES = 16
_MOST_LINES = {"narvl_jax": 350, "configs": 350, "docs": 350, "tests": 450}
_MOST_FUNCTION_LINES = 60
# Exceptions: the table of all config keys is one table.
_LONG_FILES = {"narvl_jax/experiment/config_table.py"}
_LONG_FUNCTIONS = {
  "narvl_jax/command_line/cli.py::run",
}


def _name(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def test_folders_have_few_files():
  folders = {path.parent for path in _MODULES}
  sizes = {_name(x): sum(1 for _ in x.glob("*.py")) for x in folders}
  # Each command is a file of the package's own folder.
  del sizes["narvl_jax"]
  assert not {k: v for k, v in sizes.items() if v > _MOST_FILES}


def test_files_are_short():
  lines = {_name(x): len(x.read_text("utf-8").splitlines()) for x in _MODULES}
  long = {k: v for k, v in lines.items() if v > _MOST_LINES[k.split("/")[0]]}
  assert not long.keys() - _LONG_FILES, long


@pytest.mark.parametrize("folder", ["narvl_jax", "configs"])
def test_functions_are_short(folder: str):
  long = {}
  for path in (ROOT / folder).rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        # The docstring does not count.
        first = node.body[1 if ast.get_docstring(node) else 0 :] or node.body
        lines = (node.end_lineno or 0) - first[0].lineno + 1
        if lines > _MOST_FUNCTION_LINES:
          long[f"{_name(path)}::{node.name}"] = lines
  assert not long.keys() - _LONG_FUNCTIONS, long


def test_no_files_import_each_other_in_a_circle():
  """Imports within functions count."""
  graph = grimp.build_graph("narvl_jax", cache_dir=None)
  imports = {
    name: graph.find_modules_directly_imported_by(name)
    for name in graph.modules
  }
  # Raises CycleError, which names the files.
  order = list(graphlib.TopologicalSorter(imports).static_order())
  assert len(order) == len(graph.modules) > 300
