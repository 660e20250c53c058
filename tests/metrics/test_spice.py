"""SPICE with the user's jars, by a program that stands in for Java."""

import json
import pathlib
import shutil
import stat
import sys
from collections.abc import Iterator

import pytest

from narvl_jax.metrics import captions, tokenizers

_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# Reads and writes what spice-1.0.jar does; keeps how it was called.
_JAVA = """#!{python}
import json, os, sys
if "-jar" not in sys.argv:
  sys.exit("no other program")
place = sys.argv.index("-jar") + 2
jar, source = sys.argv[place : place + 2]
with open(source) as file:
  examples = json.load(file)
seen = dict(folder=os.getcwd(), lib=os.listdir("lib"), examples=examples,
            jar=os.path.exists(jar), options=os.environ["JAVA_TOOL_OPTIONS"])
with open({seen!r}, "w") as file:
  json.dump(seen, file)
results = [
  dict(image_id=x["image_id"], scores=dict(All=dict(f=score, pr=None)))
  for x, score in zip(examples, [0.25, None, 0.75])
]
with open(sys.argv[sys.argv.index("-out") + 1], "w") as file:
  json.dump(results, file)
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[pathlib.Path]:
  """A copy of pycocoevalcap that may be written into, and Java by JAVA_HOME."""
  try:
    installed = tokenizers.package_folder()
  except tokenizers.Unavailable as error:
    pytest.skip(str(error))
  copy = tmp_path / "site" / "pycocoevalcap"
  shutil.copytree(
    installed / "spice",
    copy / "spice",
    ignore=shutil.ignore_patterns("*.jar", "cache", "tmp", "__pycache__"),
  )
  (copy / "spice" / "lib").mkdir(exist_ok=True)
  (copy / "spice" / "spice-1.0.jar").touch()
  java = tmp_path / "home" / "bin" / "java"
  java.parent.mkdir(parents=True)
  seen = str(tmp_path / "seen.json")
  java.write_text(_JAVA.format(python=sys.executable, seen=seen))
  java.chmod(java.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("JAVA_HOME", str(tmp_path / "home"))
  monkeypatch.setenv("PATH", "")
  for name in [x for x in sys.modules if x.startswith("pycocoevalcap")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.syspath_prepend(tmp_path / "site")
  yield copy
  for name in [x for x in sys.modules if x.startswith("pycocoevalcap")]:
    del sys.modules[name]


def test_the_jars_of_the_user_are_found(package, tmp_path):
  for jar in _JARS:
    (package / "spice" / "lib" / jar).touch()
  predictions = ["a dog", "a naïve café", "a cat"]
  (found,) = captions._spice(predictions, [["a dog", "one dog"], ["x"], ["a"]])
  seen = json.loads((tmp_path / "seen.json").read_text())
  assert seen["folder"] == str(package / "spice")
  assert seen["jar"]
  assert set(seen["lib"]) >= set(_JARS)
  assert "-Dfile.encoding=UTF-8" in seen["options"]
  assert [x["test"] for x in seen["examples"]] == predictions
  assert seen["examples"][0]["refs"] == ["a dog", "one dog"]
  # A picture without a score counts as 0.
  assert found.value == pytest.approx(1 / 3)
  assert found.scores.tolist() == [0.25, 0, 0.75]


def test_missing_jars_are_named_with_their_folder(package):
  (package / "spice" / "lib" / _JARS[0]).touch()
  with pytest.raises(tokenizers.Unavailable, match=rf"put {_JARS[1]} .*/lib$"):
    captions._spice(["a"], [["a"]])


def test_a_program_that_fails_gives_a_reason(package, tmp_path):
  for jar in _JARS:
    (package / "spice" / "lib" / jar).touch()
  (tmp_path / "home" / "bin" / "java").write_text("#!/bin/sh\nexit 3\n")
  with pytest.raises(tokenizers.Unavailable, match=r"SPICE failed: .*status 3"):
    captions._spice(["a"], [["a"]])
