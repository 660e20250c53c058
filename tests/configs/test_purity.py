"""Making a config opens no file and changes nothing on disk."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from narvl_jax.command_line.config_names import config_names
from tests.conftest import ROOT
from tests.data.sources import tsv_files

_PROGRAM = """
import importlib, json, sys

names, arguments = json.loads(sys.argv[1])
modules = [importlib.import_module(f"configs.{name}") for name in names]
for module in modules:
  # What is imported on first use.
  module.get_config()
events = []
watched = ("open", "os.listdir", "os.scandir", "os.mkdir", "sqlite3.connect")
sys.addaudithook(
  lambda event, args: events.append([event, str(args[0])])
  if event in watched
  else None
)
for module in modules:
  module.get_config()
  if hasattr(module, "DATASET"):
    module.get_config(arguments)
print(json.dumps(events))
"""


@pytest.mark.parametrize("there", [True, False])
def test_get_config_touches_no_file(there: bool, tmp_path: pathlib.Path):
  names = config_names()
  folder = tmp_path / "data"
  if there:
    folder.mkdir()
    for name, task in (
      ("refcoco_train", "grounding"),
      ("vqa_train", "vqa"),
      ("caption_stage1_train", "caption"),
    ):
      rows = (tsv_files.row(task, i) for i in range(3))
      tsv_files.write(folder / f"{name}.tsv", rows)
  before = {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")}
  result = subprocess.run(
    [sys.executable, "-c", _PROGRAM, json.dumps([names, f"data={folder}"])],
    capture_output=True,
    text=True,
    check=True,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
  )
  assert json.loads(result.stdout) == []
  assert {x: x.stat().st_mtime_ns for x in tmp_path.rglob("*")} == before
