"""Checkpoints in an object store."""

import contextlib
import pathlib
import re

import numpy as np
import pytest

from narvl_jax.checkpointing import overview, weights
from narvl_jax.checkpointing.chosen import choose_step
from narvl_jax.checkpointing.integrity import DamagedCheckpoint
from narvl_jax.checkpointing.record import read_leaf, stored_steps
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.errors import UserError
from narvl_jax.files.schemes import COMMIT_FILE
from narvl_jax.files.store_path import StorePath
from narvl_jax.files.stores import as_path
from tests.stores.servers import Store
from tests.support.saved import assert_equal, make_state, make_target


@pytest.fixture(params=["gcs", pytest.param("s3", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest) -> Store:
  return request.getfixturevalue(request.param)


@pytest.fixture
def run(store: Store) -> pathlib.Path:
  return as_path(f"{store.make_bucket()}/run")


def _save(run: pathlib.Path, scores: dict[int, float | None]) -> list[int]:
  state = make_state(1)
  with Checkpoints(run, keep_last=2) as checkpoints:
    for step, score in scores.items():
      checkpoints.save(step, state, score=score)
    checkpoints.wait()
    return checkpoints.steps()


def test_they_are_saved_kept_and_restored(run):
  assert _save(run, {1: 0.9, 2: None, 3: None, 4: None}) == [1, 3, 4]
  folder = run / "checkpoints"
  assert sorted(x.name for x in folder.iterdir()) == ["1", "3", "4"]
  state = make_state(1)
  with Checkpoints(run) as checkpoints:
    assert choose_step(checkpoints, "best") == 1
    assert_equal(checkpoints.restore(4, make_target(state)), state)
  name = next(x for x in checkpoints.read_record(4).leaves if "kernel" in x)
  assert np.all(np.isfinite(read_leaf(folder / "4", name)))
  listing = overview.list_checkpoints(run)
  assert re.search(r"^1 .* 0\.9000 +- +yes$", listing, re.MULTILINE)
  assert overview.verify(run).count("intact (every file)") == 3


def test_one_without_its_last_object_does_not_count(run):
  _save(run, {1: None, 2: None})
  folder = run / "checkpoints"
  (folder / "2" / COMMIT_FILE).unlink()
  assert stored_steps(folder) == [1]
  with Checkpoints(run) as checkpoints:
    assert checkpoints.steps() == [1]
  # The next run removes what was begun.
  (folder / "2" / "left").write_bytes(b"")
  assert _save(run, {2: None}) == [1, 2]
  assert not (folder / "2" / "left").exists()
  assert overview.verify(run).count("intact (every file)") == 2


def test_damage_is_found_and_set_aside(run):
  _save(run, {1: None, 2: None})
  place = StorePath(run / "checkpoints" / "2")
  largest = max(place.files(), key=lambda x: x.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(bytes(data))
  target = make_target(make_state(1))
  with Checkpoints(run) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=r"--checkpoint=1") as error:
      checkpoints.restore(2, target)
    damage = checkpoints.damage(2)
    assert damage is not None
    assert largest.name in str(error.value)
  with pytest.raises(UserError, match=r"1 of 2 read in .* damaged"):
    overview.verify(run)
  with Checkpoints(run, keep_last=2) as checkpoints:
    checkpoints.set_aside_damaged({2: damage})
    assert checkpoints.steps() == [1]
  assert stored_steps(run / "checkpoints") == [1]
  assert (run / "damaged" / "2" / COMMIT_FILE).is_file()


def test_a_run_starts_from_its_weights(run):
  _save(run, {1: 0.5, 2: None})
  with weights.opened(str(run), "init_from") as (checkpoints, step):
    assert step == 1
    assert_equal(
      checkpoints.shapes(1)["params"]["params"]["encoder"]["bias"].shape, (4,)
    )
  with (
    pytest.raises(UserError, match=r"there is no such folder"),
    weights.opened(f"{run}-absent", "init_from"),
  ):
    pass


def test_a_score_is_replaced(run):
  _save(run, {1: 0.5, 2: None})
  with Checkpoints(run, keep_last=2) as checkpoints:
    checkpoints.set_score(2, 0.7, {})
    assert checkpoints.best_step == 2
  assert overview.verify(run).count("intact (every file)") == 2


def test_a_store_that_throttles_is_waited_for(store, run):
  for place in ("params", "record.json", COMMIT_FILE):
    store.faults.fail(place, 429)
    store.faults.fail(place, 503)
  assert _save(run, {1: None}) == [1]
  assert overview.verify(run) == "1: intact (every file)"


def test_a_save_that_fails_leaves_no_checkpoint(store, run):
  state = make_state(1)
  _save(run, {1: None})
  with contextlib.suppress(UserError), Checkpoints(run, keep_last=2) as found:
    store.faults.fail("2%2Fparams", 403, times=1000)
    store.faults.fail("2/params", 403, times=1000)
    found.save(2, state)
    with pytest.raises(
      UserError,
      match=r"checkpoint of step 2 could not be saved: .*resumes from step 1",
    ):
      found.wait()
  store.faults.reset()
  assert stored_steps(run / "checkpoints") == [1]
