"""Conversion for tests."""

import filecmp
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from narvl_jax.data.shards import conversion, manifest

COMMAND = [sys.executable, "-m", "narvl_jax.convert_data"]

SHAPES = ["shapes", "--task=grounding", "--split=test"]


def run(
  *arguments: Any, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
  """Runs the command, as arguments of `before` if given."""
  return subprocess.run(
    [*before, *COMMAND, *map(str, arguments)],
    capture_output=True,
    text=True,
    check=False,
  )


def convert(
  folder: pathlib.Path, spec: str = "shapes", **options: Any
) -> manifest.Manifest:
  """Converts in this process unless `num_workers` is given."""
  convert_options = {
    key: options.pop(key)
    for key in ("num_workers", "max_bad_fraction", "log")
    if key in options
  }
  options = {"task": "grounding", "split": "test", "limit": 12, **options}
  job, origin = conversion.plan(spec, str(folder), **options)
  convert_options.setdefault("log", lambda line: None)
  return conversion.convert(job, origin, **convert_options)


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
  names = sorted(path.name for path in left.iterdir())
  assert names == sorted(path.name for path in right.iterdir())
  _, differing, errors = filecmp.cmpfiles(left, right, names, shallow=False)
  return not differing and not errors


def write_jsonl(
  folder: pathlib.Path, count: int, bad: tuple[int, ...] = ()
) -> pathlib.Path:
  """Writes pictures of 60 x 40 pixels with boxes; bad ones have no area."""
  rows = []
  for number in range(count):
    name = f"{number}.jpg"
    pixels = np.full((40, 60, 3), 3 * number, np.uint8)
    Image.fromarray(pixels).save(folder / name)
    box = [6, 4, 30, 20] if number not in bad else [6, 4, 6, 20]
    rows.append({"image": name, "prompt": f"no {number}", "target": box})
  path = folder / "own.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
