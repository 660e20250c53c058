"""Bad updates and loss spikes in the training loop."""

import math

import pytest

from narvl_jax.errors import UserError
from narvl_jax.experiment.config import train_source
from tests.run.fake_run import FakeRun, lines_of


def test_no_bundle_is_written_into_a_removed_folder(tmp_path):
  run = FakeRun(tmp_path)
  run.losses[4] = math.nan
  run.robbed = True
  with pytest.raises(UserError, match="the folder is gone"):
    run.run()
  assert run.events == []


@pytest.mark.parametrize(
  # At a report, between two, right before a checkpoint, at the very end.
  "step",
  [4, 6, 9, 10],
)
def test_broken_state_is_not_saved(tmp_path, step):
  run = FakeRun(tmp_path, checkpoint_every=3)
  run.losses[step - 1] = math.nan
  with pytest.raises(
    UserError,
    match=rf"the loss is nan at step {step}; lower --config.optimizer.learning_"
    r"rate or lengthen --config.optimizer.warmup_steps, in another --workdir,"
    r" or resume this one without the batch: --config.bad_numbers.policy=skip"
    rf", or rollback; the batch and its metrics are in {tmp_path}/bundle$",
  ):
    run.run()
  saved = [event[1] for event in run.events if event[0] == "save"]
  assert saved == [s for s in (3, 6, 9) if s < step]
  assert run.events[-1] == ("bundle", step, step - 1)
  assert lines_of(tmp_path)[-1]["step"] == step
  assert lines_of(tmp_path)[-1]["train/loss"] is None


def test_infinite_gradient_breaks_the_state_too(tmp_path):
  run = FakeRun(tmp_path)
  run.norms[4] = math.inf
  with pytest.raises(UserError, match=r"the gradient norm is inf at step 5;"):
    run.run()
  assert run.events == [("bundle", 5, 4)]


def test_skipped_updates(tmp_path):
  run = FakeRun(tmp_path, policy="skip", limit=2, checkpoint_every=5)
  run.losses |= {1: math.nan, 6: math.inf}
  assert run.run().step == 10
  assert run.events == [
    ("bundle", 2, 1),
    ("say", f"the loss is nan at step 2: skipped; see {tmp_path}/bundle"),
    ("save", 5, None),
    ("bundle", 7, 6),
    ("say", f"the loss is inf at step 7: skipped; see {tmp_path}/bundle"),
    ("save", 10, None),
  ]
  lines = lines_of(tmp_path)
  # Means are those of the updates that were made.
  assert [x["train/loss"] for x in lines] == [
    pytest.approx((1 + 3 + 4) / 3),
    pytest.approx((5 + 6 + 8) / 3),
    9.5,
  ]
  assert [x["train/skipped_updates"] for x in lines] == [1, 2, 2]
  stored = [run.saved[step] for step in (5, 10)]
  assert [x["skipped_updates"] for x in stored] == [1, 2]
  assert [x["data_position"] for x in stored] == [5, 10]


def test_too_many_skipped_updates(tmp_path):
  run = FakeRun(tmp_path, policy="skip", limit=2)
  run.losses |= {3: math.nan, 6: math.nan}
  # One of them before the run was resumed.
  with pytest.raises(
    UserError,
    match=r"nan at step 7, and 2 updates were skipped already; lower .*"
    r" or resume this one: --config.bad_numbers.limit=4;",
  ):
    run.run(stored={"skipped_updates": 1})
  assert "save" not in {event[0] for event in run.events}


def test_rollback_continues_after_the_bad_batch(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=3, log_every=1)
  run.losses[8] = math.nan
  assert run.run().step == 10
  assert [event for event in run.events if event[0] != "say"] == [
    ("save", 3, None),
    ("save", 6, None),
    ("bundle", 9, 8),
    ("restore", 6),
    ("seek", 9),
    ("save", 9, None),
    ("save", 10, None),
  ]
  # A save in progress counts.
  assert run.log[run.log.index(("restore", 6)) - 1] == ("wait",)
  assert run.events[3] == (
    "say",
    f"the loss is nan at step 9: skipped; see {tmp_path}/bundle",
  )
  assert ("say", _BACK.format(9, 6, 1, 9)) in run.events
  lines = lines_of(tmp_path)
  assert [line["step"] for line in lines] == list(range(1, 11))
  # Batches 6 to 8 were passed over.
  assert [line["data/a/examples"] for line in lines] == [
    16 * n for n in (1, 2, 3, 4, 5, 6, 10, 11, 12, 13)
  ]
  assert [line["train/rollbacks"] for line in lines] == [0] * 6 + [1] * 4
  positions = {step: x["data_position"] for step, x in run.saved.items()}
  assert positions == {3: 3, 6: 6, 9: 12, 10: 13}


_BACK = (
  "rolled back from step {} to {}, rollback {} of at most 10; continuing with"
  " batch {}"
)


def test_rollback_before_the_first_checkpoint_and_twice(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", limit=2, checkpoint_every=5)
  run.losses |= {1: math.nan, 4: math.nan}
  run.run()
  # Batch 4 comes in the third step after the second batch was passed over.
  assert [x[1:] for x in run.events if x[0] == "bundle"] == [(2, 1), (3, 4)]
  assert [x[1] for x in run.events if x[0] == "restore"] == [0, 0]
  assert run.saved[5]["data_position"] == 10
  assert run.saved[5]["rollbacks"] == 2


def test_too_many_rollbacks(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", limit=2)
  run.losses |= {1: math.nan, 4: math.nan, 5: math.nan}
  with pytest.raises(UserError, match=r"and 2 rollbacks were made already; "):
    run.run()


def test_bad_number_in_the_last_step(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=4)
  run.losses[9] = math.nan
  assert run.run().step == 10
  assert run.saved[10]["data_position"] == 12
  skipping = FakeRun(tmp_path, policy="skip")
  skipping.losses[9] = math.nan
  assert skipping.run().step == 10
  assert skipping.saved[10]["skipped_updates"] == 1


def test_stop_while_going_back(tmp_path):
  run = FakeRun(tmp_path, policy="rollback", checkpoint_every=4)
  run.losses[5] = math.nan
  run.stop_at = 7
  # What there was to save is on disk already.
  assert run.run().step == 4
  assert [x[1] for x in run.events if x[0] == "save"] == [4]


def test_loss_spikes_are_counted_across_restarts(tmp_path):
  # The first spike is within the fewest losses that a median needs.
  losses = [1.0] * 9 + [50.0, 1.0, 3.1, 2.9, 50.0] + [1.0] * 6
  whole = FakeRun(tmp_path, steps=20, log_every=1, checkpoint_every=11)
  whole.losses = dict(enumerate(losses))
  whole.run()
  counts = [x["train/loss_spikes"] for x in lines_of(tmp_path)]
  assert counts == [0] * 11 + [1] * 2 + [2] * 7
  assert str(whole.loop.health) == (
    "2 loss spikes, 0 updates skipped, 0 rollbacks"
  )
  again = FakeRun(tmp_path, steps=20, log_every=1)
  again.losses, again.batches.position = whole.losses, 11
  again.run(11, whole.saved[11])
  assert [x["train/loss_spikes"] for x in lines_of(tmp_path)] == counts[11:]
  for run in (whole, again):
    del run.saved[20]["time"]
  assert again.saved[20] == whole.saved[20]


def test_no_spike_factor_counts_nothing(tmp_path):
  run = FakeRun(tmp_path, steps=20, spike_factor=0.0)
  run.losses[15] = 1e6
  run.run()
  assert run.saved[20]["loss_spikes"] == 0


def test_no_spike_where_the_shares_of_the_data_change(tmp_path):
  """The level of the loss is another one; within it spikes still count."""
  losses = [1.0] * 15 + [9.0] * 15 + [90.0] + [9.0] * 9
  counts = {}
  for weight in (1.0, ((0, 1.0), (15, 2.0))):
    folder = tmp_path / str(weight)
    folder.mkdir()
    run = FakeRun(folder, steps=40, log_every=1, checkpoint_every=16)
    run.config.data.train.other = train_source("shapes", "vqa", weight=weight)
    run.losses = dict(enumerate(losses))
    run.run()
    counts[weight] = [x["train/loss_spikes"] for x in lines_of(folder)]
  assert counts[1.0][15] == 1
  assert counts[1.0][-1] > 2
  assert counts[((0, 1.0), (15, 2.0))] == [0] * 30 + [1] * 10

  again = FakeRun(folder, steps=40, log_every=1)
  again.config = run.config
  again.losses, again.batches.position = run.losses, 16
  again.run(16, run.saved[16])
  assert [x["train/loss_spikes"] for x in lines_of(folder)] == [0] * 14 + [
    1
  ] * 10


def test_going_back_beyond_a_change_of_shares_forgets_losses_too(tmp_path):
  run = FakeRun(
    tmp_path, steps=40, log_every=1, checkpoint_every=14, policy="rollback"
  )
  run.config.data.train.other = train_source(
    "shapes", "vqa", weight=((0, 1.0), (15, 2.0))
  )
  run.losses = dict(enumerate([1.0] * 15 + [9.0] * 60)) | {16: math.nan}
  run.run()
  assert run.saved[40]["rollbacks"] == 1
  assert run.saved[40]["loss_spikes"] == 0
