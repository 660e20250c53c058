"""Every damage to the files of a checkpoint is found and named."""

import contextlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from narvl_jax.checkpointing import digests, integrity, record
from narvl_jax.checkpointing.integrity import DamagedCheckpoint
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.files import disk
from tests.support.saved import (
  assert_equal,
  files_of,
  flip_bit,
  make_state,
  make_target,
  save_run,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
  """A checkpoint that tests copy before they damage it."""
  return save_run(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
  """The newest checkpoint of a copy of the run."""
  shutil.copytree(saved.parent, tmp_path / "checkpoints")
  return tmp_path / "checkpoints" / saved.name


def _positions(folder: pathlib.Path, count: int) -> list[tuple[str, int]]:
  """Returns bits of files, at least one of each file."""
  rng = np.random.default_rng(7)
  names = files_of(folder)
  chosen = names + list(rng.choice(names, count - len(names)))
  return [
    (name, int(rng.integers(8 * (folder / name).stat().st_size)))
    for name in chosen
  ]


def test_an_intact_one(folder):
  assert integrity.examine(folder) is None
  assert digests.has_digests(folder)


def test_one_flipped_bit_is_caught_at_100_positions(folder):
  target = make_target(make_state(6))
  positions = _positions(folder, 100)
  # Files of data, of formats, of the record and of the digests.
  assert len({name for name, _ in positions}) > 25
  with Checkpoints(folder.parent.parent, keep_last=2) as checkpoints:
    for name, bit in positions:
      flip_bit(folder / name, bit)
      with pytest.raises(
        DamagedCheckpoint, match=f"step 6 .*{re.escape(name)}"
      ):
        checkpoints.restore(6, target)
      flip_bit(folder / name, bit)
    # No test left damage behind.
    assert_equal(
      jax.device_get(checkpoints.restore(6, target)),
      jax.device_get(make_state(6)),
    )


def test_without_digests_no_flipped_bit_changes_a_value(folder):
  """The process was killed before it wrote digests."""
  (folder / "digests.0-of-1.txt").unlink()
  target = make_target(make_state(6))
  expected = jax.device_get(make_state(6))
  caught = 0
  with Checkpoints(folder.parent.parent, keep_last=2) as checkpoints:
    assert_equal(jax.device_get(checkpoints.restore(6, target)), expected)
    for name, bit in _positions(folder, 60):
      flip_bit(folder / name, bit)
      try:
        state = checkpoints.restore(6, target)
      except DamagedCheckpoint:
        caught += 1
      else:
        # A bit of a file without values, or of a part that is not read.
        assert_equal(jax.device_get(state), expected)
      flip_bit(folder / name, bit)
  assert caught > 10


def test_without_digests_arrays_are_looked_at(folder):
  names = [x for x in files_of(folder) if "/ocdbt.process_0/d/" in x]
  (folder / "digests.0-of-1.txt").unlink()
  assert integrity.examine(folder) is None
  found = []
  for name in names:
    flip_bit(folder / name, 8 * 100)
    damage = integrity.examine(folder)
    found += [] if damage is None else [x[0] for x in damage.leaves]
    flip_bit(folder / name, 8 * 100)
  assert sorted(found) == ["ema/params/encoder/kernel", "params/encoder/kernel"]


def test_file_and_array_are_named(folder):
  found = {}
  for name in files_of(folder):
    if "/ocdbt.process_0/d/" not in name:
      continue
    flip_bit(folder / name, 8 * 100)
    damage = integrity.examine(folder)
    assert damage is not None
    assert damage.files == [[name, "was changed"]]
    found |= {name: what for name, what in damage.leaves}
    flip_bit(folder / name, 8 * 100)
  # Arrays with their own files.
  assert found.keys() == {
    "params/encoder/kernel",
    "ema/params/encoder/kernel",
  }


def test_truncated_missing_renamed_and_added_files_are_named(folder):
  for name in files_of(folder):
    path = folder / name
    data = path.read_bytes()
    if name.startswith("digests."):
      continue
    path.write_bytes(data[:-1])
    damage = integrity.examine(folder)
    assert damage is not None
    size = len(data)
    assert [name, f"has {size - 1} bytes, not {size}"] in damage.files
    path.unlink()
    damage = integrity.examine(folder)
    assert damage is not None
    assert [name, "is missing"] in damage.files
    path.with_name("other").write_bytes(data)
    damage = integrity.examine(folder)
    assert damage is not None
    other = pathlib.PurePosixPath(name).with_name("other")
    assert any(
      x[0] == name and x[1].startswith("was renamed to") for x in damage.files
    ), (other, damage.files)
    path.with_name("other").unlink()
    path.write_bytes(data)
  (folder / "params" / "other").write_text("")
  damage = integrity.examine(folder)
  assert damage is not None
  assert damage.files == [["params/other", "is not a file of this checkpoint"]]


def test_an_empty_file_is_reported(folder):
  path = folder / "digests.0-of-1.txt"
  path.write_bytes(b"")
  damage = integrity.examine(folder)
  assert str(damage) == "file digests.0-of-1.txt was changed"


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("how", ["renamed", "copied"])
def test_a_step_under_another_name_is_reported(folder, how, digests):
  if not digests:
    # The digests of a killed run are missing.
    (folder / "digests.0-of-1.txt").unlink()
  other = folder.with_name("9")
  if how == "renamed":
    folder.rename(other)
  else:
    shutil.copytree(folder, other)
  damage = integrity.examine(other)
  assert damage is not None
  assert str(damage) == "folder 9 is the checkpoint 6 under another name"
  target = make_target(make_state(6))
  with Checkpoints(folder.parent.parent, keep_last=3) as checkpoints:
    assert 9 in checkpoints.steps()
    for read in (checkpoints.read_record, checkpoints.shapes):
      with pytest.raises(DamagedCheckpoint, match="checkpoint 6 under another"):
        read(9)
    with pytest.raises(DamagedCheckpoint, match="checkpoint 6 under another"):
      checkpoints.restore(9, target)


def test_a_copy_does_not_have_the_score_of_the_original(tmp_path):
  with Checkpoints(tmp_path, keep_last=2) as checkpoints:
    checkpoints.save(3, make_state(3), score=0.5)
  folder = tmp_path / "checkpoints" / "3"
  shutil.copytree(folder, folder.with_name("9"))
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.best_step == 3


def test_only_steps_are_names_of_checkpoints(tmp_path):
  for name in ("0", "10", "007", "\u00b2", "9.2", "-1", "tmp"):
    (tmp_path / name).mkdir()
  assert record.stored_steps(tmp_path) == [0, 10]


def test_a_record_is_replaced_and_a_kill_in_between_does_no_harm(
  folder, monkeypatch
):
  old = record.read_record(folder)
  before = folder.with_name("6.before")
  shutil.copytree(folder, before)

  class KilledError(Exception):
    pass

  # Before and after each file that is written.
  for kill in range(4):
    count = [0]

    @contextlib.contextmanager
    def atomically(path, kill=kill, count=count):
      if count[0] == kill:
        raise KilledError
      with disk.atomically(path) as temporary:
        yield temporary
      count[0] += 2
      if count[0] == kill + 1:
        raise KilledError

    shutil.rmtree(folder)
    shutil.copytree(before, folder)
    new = old._replace(score=0.25, run={"position": 7})
    with monkeypatch.context() as patch:
      patch.setattr(digests, "atomically", atomically)
      with pytest.raises(KilledError):
        digests.replace_record(folder, new)
    assert integrity.examine(folder) is None
    assert record.read_record(folder) == (old if kill == 0 else new)
  shutil.rmtree(folder)
  shutil.copytree(before, folder)
  digests.replace_record(folder, new)
  assert digests.has_digests(folder)
  assert integrity.examine(folder) is None
  flip_bit(folder / "record" / "record.json", 100)
  damage = integrity.examine(folder)
  assert damage is not None
  assert damage.files == [["record/record.json", "was changed"]]


def test_hosts_share_the_work_and_agree(folder, monkeypatch):
  path = folder / "digests.0-of-1.txt"
  path.unlink()
  for host in range(3):
    digests.write_digests(folder, host, 3)
  parts = [
    json.loads(
      (folder / f"digests.{host}-of-3.txt").read_text().partition("\n")[2]
    )
    for host in range(3)
  ]
  assert parts[1]["files"] == {}
  assert len(parts[0]["files"]) > 25
  assert integrity.examine(folder) is None
  names = [x for x in files_of(folder) if not x.startswith("digests.")]
  read = []
  digest = digests._digest_file
  monkeypatch.setattr(
    digests, "_digest_file", lambda path: (read.append(path), digest(path))[1]
  )
  for name in names[2], names[17]:
    flip_bit(folder / name, 5)
  values: list[list] = [[], [], []]

  def gather(host: int):
    # Notes the value of each host.
    return lambda value: (values[host].append(value), [value])[1]

  for host in range(3):
    read.clear()
    integrity.examine(folder, host, 3, gather(host))
    assert len(read) <= len(names) // 3 + 1
  reported = [x for said in values for x in said[0][0]]
  assert sorted(name for name, _ in reported) == sorted([names[2], names[17]])
  # One is lost: files that no other lists cannot be checked.
  (folder / "digests.2-of-3.txt").unlink()
  assert not digests.has_digests(folder)


def test_damage_on_another_host_counts_here(folder):
  theirs = [[["params/x", "was changed"]], True]
  rounds = iter([lambda own: [own, theirs], lambda own: [own, []]])
  damage = integrity.examine(folder, 0, 2, lambda own: next(rounds)(own))
  assert damage is not None
  assert damage.files == [["params/x", "was changed"]]


def test_readers_report_an_intact_checkpoint(folder):
  name = next(x for x in files_of(folder) if x.startswith("params/d/"))
  flip_bit(folder / name, 3)
  run = folder.parent.parent
  target = make_target(make_state(6))
  variables = {"params": target.params, "batch_stats": target.batch_stats}
  with Checkpoints(run) as checkpoints:
    with pytest.raises(
      UserError,
      match=rf"step 6 is damaged: file {name} was changed.*"
      r"; the nearest one that is intact: --checkpoint=3$",
    ):
      checkpoints.restore_variables(6, variables, None)
    checkpoints.restore_variables(3, variables, None)
    flip_bit(folder.with_name("3") / "record" / "record.json", 80)
    with pytest.raises(UserError, match=r"no other one of this run is intact$"):
      checkpoints.restore_variables(6, variables, None)
  assert sorted(x.name for x in run.iterdir()) == ["checkpoints"]


def test_values_that_were_read_are_compared(folder, monkeypatch):
  """Damage between the disk and the devices."""
  target = make_target(make_state(6))
  with Checkpoints(folder.parent.parent, keep_last=2) as checkpoints:
    restore = checkpoints._manager.restore

    def wrong(*args, **kwargs):
      found = dict(restore(*args, **kwargs))
      stats = found["params"]["batch_stats"]["norm"]
      stats["mean"] = stats["mean"].at[2].multiply(-1)
      return found

    monkeypatch.setattr(checkpoints._manager, "restore", wrong)
    with pytest.raises(
      DamagedCheckpoint,
      match=r"array batch_stats/norm/mean has other values than those that",
    ):
      checkpoints.restore(6, target)


def test_records_of_damaged_ones_do_not_keep_others_from_being_used(folder):
  run = folder.parent.parent
  for name in ("_CHECKPOINT_METADATA", "record/record.json"):
    (folder / name).write_bytes(b'{"commit_timestamp_nsecs": "x"}')
  with Checkpoints(run, keep_last=2) as checkpoints:
    assert checkpoints.steps() == [3, 6]
    checkpoints.restore(3, make_target(make_state(3)))
    with pytest.raises(DamagedCheckpoint, match=r"record.json has 31 bytes"):
      checkpoints.read_record(6)
