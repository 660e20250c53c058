"""Full, read-only and missing disks: one line, no partial file."""

import errno
import os
import pathlib

import pytest

from narvl_jax.errors import UserError
from narvl_jax.evaluation import reporting
from narvl_jax.files import disk, disk_errors
from narvl_jax.reliability.explain import describe_failure
from narvl_jax.run_folder.lock import RunLock
from narvl_jax.run_folder.metrics import MetricsWriter
from tests.support.disks import files, fill, read_only, short_files, small_disk


def _error(number: int, path: pathlib.Path | str | None = None) -> OSError:
  if path is None:
    return OSError(number, os.strerror(number))
  return OSError(number, os.strerror(number), str(path))


@pytest.mark.parametrize(
  ("number", "reason", "advice"),
  [
    (errno.ENOSPC, "No space left on device", "make room"),
    (
      errno.EDQUOT,
      "Disk quota exceeded",
      "make room, or have the quota raised",
    ),
    (errno.EROFS, "Read-only file system", "make it writable again"),
    (errno.ESTALE, "Stale file handle", "mount it again"),
    (errno.EFBIG, "File too large", "raise the largest size of a file"),
  ],
)
def test_a_disk_that_fails(tmp_path, number, reason, advice):
  path = tmp_path / "absent" / "metrics.jsonl"
  text = disk_errors.explain_disk(_error(number, path), tmp_path / "other")
  assert text is not None
  assert text.startswith(f"{path} cannot be written or read: {reason} (")
  assert f" bytes are free in {tmp_path}); {advice}" in text
  # Writing to an open file names no file; errors of C++ are texts.
  for error in (_error(number), ValueError(f"[tensorstore] {reason}: write")):
    text = disk_errors.explain_disk(error, tmp_path)
    assert text is not None
    assert text.startswith(f"{tmp_path} cannot be written or read: {reason} (")
  # Commands without a run folder.
  text = disk_errors.explain_disk(_error(number))
  assert text is not None
  assert text.startswith(
    f"a file cannot be written or read: {reason}; {advice}"
  )


def test_causes_of_an_error_count(tmp_path):
  try:
    try:
      raise _error(errno.ENOSPC, tmp_path / "x")
    except OSError as error:
      raise RuntimeError("saving failed") from error
  except RuntimeError as error:
    text = disk_errors.explain_disk(error, tmp_path)
  assert text is not None
  assert text.startswith(f"{tmp_path / 'x'} cannot")


def test_files_of_the_run_that_vanish(tmp_path):
  run = tmp_path / "run"
  run.mkdir()
  path = run / "checkpoints" / "3" / "params"
  text = disk_errors.explain_disk(_error(errno.ENOENT, path), run)
  assert text is not None
  assert text.startswith(f"{path} cannot be written or read: No such file")
  run.rmdir()
  assert disk_errors.explain_disk(_error(errno.ENOENT, path), run) == (
    f"the folder {run} no longer exists; params was expected in it: restore it"
  )


def test_other_files_that_are_missing_are_no_fault_of_the_disk(tmp_path):
  for error in (
    _error(errno.ENOENT, "/somewhere/else"),
    _error(errno.EACCES, tmp_path.parent / "x"),
    _error(errno.ENOENT),
    ValueError("wrong"),
    ConnectionResetError(errno.ECONNRESET, "reset"),
  ):
    assert disk_errors.explain_disk(error, tmp_path) is None


def test_a_run_ends_with_code_2_and_one_line(tmp_path):
  error = _error(errno.ENOSPC, tmp_path / "metrics.jsonl")
  code, message = describe_failure(error, tmp_path)
  assert code == 2
  assert message.startswith(f"error: {tmp_path / 'metrics.jsonl'} cannot be")
  assert message.endswith(
    "; make room, then run the same command again to resume"
  )


def test_predictions_on_a_full_disk(tmp_path):
  """The limit of file sizes simulates a full disk without privileges."""
  path = tmp_path / "predictions" / "test.jsonl"
  reporting.write_predictions(path, [{"old": True}])
  with (
    short_files(100),
    pytest.raises(
      UserError,
      match=r'cannot write ".*test.jsonl": File too large \([\d,]+ bytes are'
      r" free\); raise the largest size of a file",
    ),
  ):
    reporting.write_predictions(path, [{"new": "x" * 200}])
  assert path.read_text() == '{"old": true}\n'
  assert files(tmp_path) == {"predictions/test.jsonl"}


def _write_metrics(writer: MetricsWriter, steps: int) -> None:
  for step in range(1, steps + 1):
    writer.write(step, {"train/loss": 1.0 / step})
    writer.flush()


def test_metrics_reach_the_limit_of_a_file(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    _write_metrics(writer, 3)
    with (
      short_files(1000),
      pytest.raises(OSError, match="File too large") as error,
    ):
      _write_metrics(writer, 1000)
    assert describe_failure(error.value, tmp_path)[0] == 2


def test_metrics_on_a_full_disk(tmp_path, capfd):
  with small_disk(tmp_path / "run", 100) as run:
    writer = MetricsWriter(run)
    _write_metrics(writer, 3)
    fill(run)
    with pytest.raises(OSError, match="No space left") as error:
      # More than the file system has allocated for the files.
      _write_metrics(writer, 1000)
    _, message = describe_failure(error.value, run)
    # The error of TensorBoard's file does not name it.
    assert message.startswith((f"error: {run} ", f"error: {run}/metrics.jsonl"))
    assert "cannot be written or read: No space left on device (0 " in message
    (run / "filler").unlink()
    # Lines are written once there is room, and each is complete.
    writer.close()
    for line in (run / "metrics.jsonl").read_text().splitlines():
      assert line.startswith('{"step": ')
      assert line.endswith("}")
  assert capfd.readouterr().err == ""


def test_a_full_disk_has_room_for_signs_of_life(tmp_path):
  with small_disk(tmp_path / "run", 100) as run:
    lock = RunLock(run)
    lock.acquire(print)
    fill(run)
    lock.renew("step", 5)
    assert '"step": 5' in (run / "lock.json").read_text()
    lock.release()


def test_a_full_disk_has_no_room_for_a_lock(tmp_path):
  with small_disk(tmp_path / "run", 100) as run:
    fill(run)
    with pytest.raises(OSError, match="No space left"):
      RunLock(run).acquire(print)
    assert files(run) == {"filler"}


def test_a_disk_that_can_hold_no_more_files(tmp_path):
  with small_disk(tmp_path / "run", 1000, files=4) as run:
    for number in range(3):
      (run / str(number)).touch()
    with pytest.raises(OSError, match="No space left") as error:
      (run / "last").touch()
    text = disk_errors.explain_disk(error.value, run)
    assert text is not None
    assert "cannot be written or read: the disk can hold no more files (" in (
      text
    )
    assert " bytes are free, but no inode" in text
    assert text.endswith("; remove some, or have the number of inodes raised")
    # Errors of C++ name no file.
    text = disk_errors.explain_disk(
      ValueError("open: No space left on device"), run
    )
    assert text is not None
    assert "but no inode" in text
    with pytest.raises(UserError, match="the disk can hold no more files"):
      disk.write_text(run / "x.json", "{}")


@pytest.mark.parametrize(
  ("free", "files", "left", "said"),
  [
    (40 << 20, 45, 0, "but no inode"),
    # Temporary files were removed before the inodes are counted.
    (40 << 20, 45, 31, "but only 31 inodes"),
    (40 << 20, 10_000, 1, "but only 1 inodes"),
    (40 << 20, 0, 0, "but an unknown number of inodes"),
    # Bytes are missing, not inodes.
    (40 << 20, 10_000, 5000, None),
    (1 << 19, 45, 31, None),
    (0, 45, 31, None),
    (0, 0, 0, None),
  ],
)
def test_a_full_disk_reports_bytes_or_inodes(
  tmp_path, monkeypatch, free, files, left, said
):
  size = 50 << 20
  status = os.statvfs_result(
    (4096, 4096, size // 4096, *[free // 4096] * 2, files, left, left, 0, 255)
  )
  monkeypatch.setattr(disk_errors.os, "statvfs", lambda path: status)
  text = disk_errors.reason_of(errno.ENOSPC, tmp_path / "file")
  assert ("inode" in text) == (said is not None)
  assert (said or "No space left on device") in text


def test_a_disk_that_becomes_read_only(tmp_path):
  with small_disk(tmp_path / "run", 100) as run:
    lock = RunLock(run)
    lock.acquire(print)
    read_only(run)
    lock.renew("step", 5)
    with pytest.raises(UserError, match=r"Read-only file system.*make it writ"):
      disk.write_text(run / "x.json", "{}")
    assert files(run) == {"lock.json"}
