"""A program for several processes; `--mode` selects what it does."""

import functools
import json
import os
import pathlib
import signal
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.data.example import Record
from narvl_jax.errors import UserError
from narvl_jax.evaluation.tally import Tally
from narvl_jax.hosts import cluster, distributed
from narvl_jax.parallel import local_rows, shard_batch
from narvl_jax.prediction.predictor import Answer
from narvl_jax.reliability import session as hosts
from narvl_jax.reliability.explain import explain_failure
from tests.support import runs

# The axis of each spans two hosts of two devices.
SHAPES = ((4, 1, 1), (1, 4, 1), (1, 1, 4))
STEPS = 15


def losses(shape: tuple[int, int, int], steps: int) -> list[float]:
  """Returns the losses of the small model on a mesh of all processes."""
  run = runs.setup(shape)
  size = run.experiment.config.train.batch_size
  rows = local_rows(run.mesh, size)
  found = []
  with jax.set_mesh(run.mesh):
    state = run.init(jax.random.key(0))
    step = functools.partial(run.compile_step(), run.read_inputs())
    distributed.barrier("compiled")
    for index in range(steps):
      whole = runs.host_batch(index)
      part = {name: values[rows] for name, values in whole.items()}
      state, metrics = step(state, shard_batch(part, run.mesh, size))
      found.append(float(metrics["loss"]))
  return found


def _counts(index: int, count: int) -> tuple[dict[str, int], str]:
  """Counts examples on all hosts; the first one is on each of them.

  Returns:
    The counts of the report, and the error if one more example is expected.
  """
  tally, total = Tally(), 5
  for position in {0, *range(index, total, count)}:
    image = np.full((4, 4, 3), position, np.uint8)
    record = Record(str(position), "vqa", image, answers={"red": 1.0})
    answer = Answer(record, position, "red", 0.0)
    tally.update(answer, position, dataset="vqa", index=position)
  whole = tally.of_all_hosts()
  whole.check(total)
  try:
    whole.check(total + 1)
  except RuntimeError as error:
    return whole.report(split="test", step=1)["counts"], str(error)
  return {}, ""


def _exchange(folder: pathlib.Path) -> None:
  """Tests barriers, gathered values and the placement of rows."""
  index = jax.process_index()
  distributed.barrier("one")
  values = distributed.gather_json({"host": index, "text": "x" * 10 * index})
  mesh = runs.make_mesh(2, 2, 2)
  rows = local_rows(mesh, 8)
  whole = np.arange(16).reshape(8, 2)
  array = shard_batch({"x": whole[rows]}, mesh, 8)["x"]
  total = jax.jit(lambda x: (x * np.arange(1, 9)[:, None]).sum())(array)
  counts = _counts(index, jax.process_count())
  missing = ""
  # Process 1 arrives too late.
  time.sleep(2.0 * index)
  try:
    distributed.barrier("late", timeout=0.5)
  except distributed.HostsLost as error:
    missing = str(error)
  result = {
    "values": values,
    "rows": rows,
    "devices": jax.device_count(),
    "total": int(total),
    "counts": counts,
    "missing": missing,
  }
  print("printed by python", flush=True)
  os.write(1, b"printed below python\n")
  (folder / f"result{index}.json").write_text(json.dumps(result))


def _run(mode: str, folder: pathlib.Path) -> None:
  index = jax.process_index()
  if mode == "exchange":
    _exchange(folder)
  elif mode == "losses":
    found = [losses(shape, STEPS) for shape in SHAPES]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"losses{index}.json").write_text(json.dumps(found))
  elif mode == "fail" and index == 1:
    raise UserError("no such picture")
  elif mode == "kill" and index == 1:
    os.kill(os.getpid(), signal.SIGKILL)
  else:
    time.sleep(300)


def main(argv: Sequence[str]) -> None:
  """Entry point."""
  del argv
  settings = flags.FLAGS
  folder = pathlib.Path(settings.folder)
  with hosts.together(
    cluster.detect(settings),
    folder / "logs",
    lambda: {"version jax": jax.__version__},
    lambda error: explain_failure(error, folder),
    print,
  ):
    _run(settings.mode, folder)


if __name__ == "__main__":
  flags.DEFINE_string("folder", None, "For the results.")
  flags.DEFINE_string("mode", None, "What to do.")
  cluster.define_flags()
  cli.run(main)
