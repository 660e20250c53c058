"""`python -m narvl_jax.checkpoints`: list, verify, diff."""

import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict

from narvl_jax import checkpoints as command
from narvl_jax.checkpointing import overview
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from tests.support.saved import files_of, flip_bit, make_state

_KEEP: Any = {"keep_last": 1, "keep_best": 1, "keep_every": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A run with three checkpoints; tests copy it."""
  folder = tmp_path_factory.mktemp("saved")
  with Checkpoints(
    folder, **_KEEP, config=ConfigDict({"train": _KEEP})
  ) as checkpoints:
    for step, score in ((1, 0.75), (2, None), (3, 0.5)):
      checkpoints.save(step, make_state(step), score=score)
  return folder


@pytest.fixture
def run(saved, tmp_path) -> pathlib.Path:
  """A run of its own with three checkpoints."""
  return shutil.copytree(saved, tmp_path / "run")


def _damage(run: pathlib.Path, step: int) -> str:
  folder = run / "checkpoints" / str(step)
  name = next(x for x in files_of(folder) if x.startswith("params/d/"))
  flip_bit(folder / name, 8 * 40)
  return name


def test_list(run):
  (run / "checkpoints" / "3" / "digests.0-of-1.txt").unlink()
  head, *rows = overview.list_checkpoints(run).splitlines()
  assert re.split(r"  +", head) == [
    *("step", "saved", "size", "score", "kept as", "digests")
  ]
  cells = [re.split(r"  +", row) for row in rows]
  assert [(x[0], *x[3:]) for x in cells] == [
    ("1", "0.7500", "best", "yes"),
    ("2", "-", "every 2", "yes"),
    ("3", "0.5000", "last", "no"),
  ]
  assert all(x[2].endswith(" kB") for x in cells)


def test_a_damaged_record_is_listed(run):
  flip_bit(run / "checkpoints" / "2" / "record" / "record.json", 99)
  assert "damaged record" in overview.list_checkpoints(run).splitlines()[2]


def test_verify(run, capsys):
  (run / "checkpoints" / "2" / "digests.0-of-1.txt").unlink()
  assert overview.verify(run).splitlines() == [
    "1: intact (every file)",
    "2: intact (every array; it has no digests)",
    "3: intact (every file)",
  ]
  name = _damage(run, 1)
  assert overview.verify(run, 3) == "3: intact (every file)"
  with pytest.raises(UserError, match=r"1 of 3 .* damaged: checkpoint 1;"):
    overview.verify(run)
  printed = capsys.readouterr().out
  assert f"1: DAMAGED\n  file {name} was changed\n  array " in printed


def test_a_file_in_the_place_of_a_checkpoint_is_damage(run, capsys):
  place = run / "checkpoints" / "2"
  shutil.rmtree(place)
  place.write_text("")
  with pytest.raises(UserError, match=r"^1 of 3 read in .*: checkpoint 2; "):
    overview.verify(run)
  printed = capsys.readouterr().out
  assert "\n2: DAMAGED\n  it is a file, not a folder\n3: intact" in printed
  with pytest.raises(UserError, match="2 is damaged: it is a file, not a fo"):
    overview.diff(place, place.with_name("3"))


def test_a_damaged_one_ends_the_command_with_code_2(run):
  _damage(run, 1)
  done = subprocess.run(
    [sys.executable, "-m", "narvl_jax.checkpoints", "verify", str(run)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert "\n2: intact (every file)\n" in done.stdout
  assert done.stderr.startswith("error: 1 of 3 read in ")
  assert done.stderr.count("\n") == 1


def test_diff(run):
  folder = run / "checkpoints"
  assert overview.diff(folder / "2", folder / "2") == "9 of 9 arrays are equal"
  lines = overview.diff(folder / "1", folder / "3").splitlines()
  assert re.split(r"  +", lines[0]) == [
    *("array", "shape", "max |a - b|", "|a - b| / |a|")
  ]
  rows = {x[0]: x[1:] for x in (re.split(r"  +", y) for y in lines[1:-1])}
  assert rows["step"] == ["a number", "2.000e+00", "2.000e+00"]
  kernel = rows["params/encoder/kernel"]
  assert kernel[0] == "24x32"
  # Of independent values with a variance of 1.
  assert 1.3 < float(kernel[2]) < 1.5
  # The moments are the same in all.
  assert lines[-1] == f"{9 - len(rows)} of 9 arrays are equal"
  assert not any(name.startswith("opt_state") for name in rows)


def test_diff_of_other_trees(run, tmp_path_factory):
  other = tmp_path_factory.mktemp("other")
  state = make_state(3, ema=False)
  params = {"encoder": {"kernel": state.params["encoder"]["kernel"][:2]}}
  with Checkpoints(other, keep_last=1) as checkpoints:
    checkpoints.save_variables(0, {"params": params, "batch_stats": {}})
  first, second = overview.find_pair([run, other], None)
  assert (first.name, second.name) == ("3", "0")
  text = overview.diff(first, second)
  assert re.search(r"params/encoder/kernel +24x32 \| 2x32 +- +-\n", text)
  assert f"only in {first}: opt_state/0/count\n" in text
  assert "only in " + str(second) not in text
  assert text.endswith("\n0 of 9 arrays are equal")


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda run: overview.list_checkpoints(run / "no"),
      r"no has no ch",
    ),
    (lambda run: overview.verify(run, 7), r'no checkpoint "7" in .* 1, 2, 3'),
    (
      lambda run: overview.find_pair([run], ["1"]),
      r"--checkpoint=1 is not two ch",
    ),
    (
      lambda run: overview.find_pair([run], None),
      r"diff of one run needs two",
    ),
    (
      lambda run: overview.find_pair([run], ["1", "x"]),
      r'no checkpoint "x" in',
    ),
    (lambda run: command.main(["", "lst", "."]), r'"lst".* "list"\?'),
  ],
)
def test_mistakes(run, call, message):
  with pytest.raises(UserError, match=message):
    call(run)


def test_damaged_ones_are_not_compared(run):
  folder = run / "checkpoints"
  _damage(run, 1)
  with pytest.raises(UserError, match=r"/1 is damaged: file .*another one: -"):
    overview.diff(folder / "1", folder / "2")
