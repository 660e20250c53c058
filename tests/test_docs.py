"""The documents: links, names of files, commands, settings and Python code."""

import ast
import importlib
import inspect
import pathlib
import re
from typing import Any

import pytest

from narvl_jax.command_line import config_names
from narvl_jax.configs import shapes
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FILES = [
  str(path.relative_to(ROOT.parent))
  for folder in ("narvl_jax", "configs", "tests", "launch", "docs", ".ci")
  for path in (ROOT / folder).rglob("*.*")
]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda x: x.name)


def _blocks(page: pathlib.Path, language: str) -> list[str]:
  """Returns the code blocks of a page."""
  text = page.read_text(encoding="utf-8")
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def _anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
  found = set()
  for heading in re.findall(r"^#+ (.*)$", text, re.M):
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
  return found


@each_page
def test_links_lead_somewhere(page: pathlib.Path):
  text = page.read_text(encoding="utf-8")
  for target in _LINK.findall(text):
    if target.startswith(("http://", "https://")):
      continue
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), target
    if anchor:
      assert anchor in _anchors(file), target


def test_the_readme_stays_short():
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 200
  assert len(text.split()) <= 1600


@each_page
def test_commands_exist(page: pathlib.Path):
  for name in re.findall(r"-m narvl_jax\.([\w.]+)", page.read_text("utf-8")):
    path = ROOT / "narvl_jax" / name.replace(".", "/")
    found = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    assert found or name == "COMMAND", name


@each_page
def test_source_files_exist(page: pathlib.Path):
  for name in re.findall(r"`([\w/]+\.(?:py|sh))\b", page.read_text("utf-8")):
    # Some are named by the end of their path.
    found = any(path.endswith("/" + name) for path in _FILES)
    assert found or name == "FILE.py" or "NAME" in name, name


@each_page
def test_settings_exist(page: pathlib.Path):
  settings = shapes.get_config()
  for key in re.findall(r"--config\.([\w.]+)=", page.read_text("utf-8")):
    if key == "KEY" or key.startswith(("data.train.", "data.evaluation.")):
      continue
    value: Any = settings
    for part in key.split("."):
      assert part in value, key
      value = value[part]


@each_page
def test_configs_exist(page: pathlib.Path):
  text = page.read_text("utf-8")
  for name in re.findall(r"--config=(?:configs/)?([a-z]\w*)(?![\w/])", text):
    assert name in config_names.config_names(), name


@each_page
def test_python_blocks_compile_and_their_imports_exist(page: pathlib.Path):
  for block in _blocks(page, "python"):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom):
        module = importlib.import_module(str(node.module))
        for alias in node.names:
          if not hasattr(module, alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")


def test_the_model_of_the_readme_runs():
  (block,) = [x for x in _blocks(PAGES[0], "python") if "NARVL(" in x]
  found: dict[str, Any] = {}
  exec(block, found)
  assert found["logits"].shape == (2, 6, 500)
  assert found["loss"].shape == (2,)


def test_functions_of_the_readme_accept_these_arguments():
  from narvl_jax.evaluate import evaluate
  from narvl_jax.predict import predict

  functions = {"predict": predict, "evaluate": evaluate}
  calls = [
    node
    for block in _blocks(PAGES[0], "python")
    for node in ast.walk(ast.parse(block))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id in functions
  ]
  assert len(calls) == len(functions)
  for call in calls:
    inspect.signature(functions[call.func.id]).bind(  # pyright: ignore
      *call.args, **{str(x.arg): x.value for x in call.keywords}
    )


def test_the_architecture_names_every_folder():
  text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
  diagram = text.split("```")[1]
  folders = {
    path.name
    for path in (ROOT / "narvl_jax").iterdir()
    if path.is_dir() and path.name not in ("configs", "__pycache__")
  }
  assert set(re.findall(r"(\w+)/", diagram)) == folders
