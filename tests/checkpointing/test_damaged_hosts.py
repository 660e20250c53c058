"""Several hosts reject the same damaged checkpoint."""

import pathlib

import pytest

from narvl_jax.checkpointing import integrity
from tests.support.processes import start_together
from tests.support.saved import files_of, flip_bit


def _run(folder: pathlib.Path, mode: str) -> tuple[str, ...]:
  arguments = [
    *("-m", "tests.programs.damaged_program"),
    *(f"--folder={folder}", f"--mode={mode}", "--start_timeout=300"),
  ]
  processes = start_together(folder, arguments)
  codes = [process.wait() for process in processes]
  assert codes == [0, 0], "\n".join(x.errors for x in processes)
  logs = sorted((folder / "logs").iterdir())
  return tuple(log.read_text() for log in logs)


@pytest.mark.slow
def test_hosts_reject_what_one_of_them_finds_damaged(tmp_path):
  _run(tmp_path, "save")
  folder = tmp_path / "run" / "checkpoints" / "2"
  # Each host wrote its digests.
  digests = [x for x in files_of(folder) if x.startswith("digests.")]
  assert digests == ["digests.0-of-2.txt", "digests.1-of-2.txt"]
  written = (folder / "digests.1-of-2.txt").read_text()
  assert written.count("ocdbt.process_1/") >= 2
  assert "ocdbt.process_0/" not in written
  assert integrity.examine(folder) is None
  # Values that the second host wrote.
  name = max(
    (x for x in files_of(folder) if "params/ocdbt.process_1/d/" in x),
    key=lambda x: (folder / x).stat().st_size,
  )
  flip_bit(folder / name, 8 * 500)
  logs = _run(tmp_path, "resume")
  for log in logs:
    assert f"step 2 is damaged: file {name} was changed; array " in log
    assert "set aside: step 2: " in log
    assert "RESULT 1 1 True\n" in log
  assert (tmp_path / "run" / "damaged" / "2" / name).exists()
  assert integrity.examine(folder) is None
