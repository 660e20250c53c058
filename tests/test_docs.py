"""The documents: links that lead somewhere, and a README of its size."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of a page's headings, as GitHub makes them."""
  text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
  found = set()
  for heading in re.findall(r"^#+ (.*)$", text, re.M):
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
  return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


def test_modules_that_the_documents_name_exist():
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"-m narvl_jax\.([\w.]+)", text):
      path = ROOT / "narvl_jax" / name.replace(".", "/")
      found = (
        path.with_suffix(".py").exists() or (path / "__main__.py").exists()
      )
      assert found or name == "COMMAND", (page.name, name)
