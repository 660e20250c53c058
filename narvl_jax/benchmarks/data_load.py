"""Data of `narvl_jax.benchmarks.data`; CPU time and memory of processes."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from narvl_jax.benchmarks.data_files import write_vqa_tsv
from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.bad_records import BadRecord, RecordReader
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.data.example import Record
from narvl_jax.data.sources import load_source
from narvl_jax.data.sources.ofa_tsv import OfaTsvSource
from narvl_jax.data.tasks import Task, make_task, vocabulary_texts
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.experiment.datasets import load_mixture
from narvl_jax.files.disk import replacing
from narvl_jax.files.stores import is_remote

_VOCABULARY_RECORDS = 256
_IDLE_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Load:
  """Data and how they are read.

  Attributes:
    entries: sources of the mixture.
    tasks: name -> task.
    image_size: (height, width) in pixels.
    max_text_length: tokens of the prompt.
    max_label_length: labels of the target.
    batch_size: examples of a batch.
    num_threads: threads of each worker process.
  """

  entries: list[MixtureEntry]
  tasks: Mapping[str, Task[Any]]
  image_size: tuple[int, int] = (480, 480)
  max_text_length: int = 80
  max_label_length: int = 20
  batch_size: int = 32
  num_threads: int = 1

  def batches(
    self, num_workers: int, *, threads: int, prefetch: int
  ) -> pipeline.TrainBatches:
    """Opens the batches of a training run."""
    return pipeline.train_batches(
      Mixture(self.entries, batch_size=self.batch_size, seed=0),
      self.tasks,
      0,
      pipeline.Batcher(
        self.image_size, self.max_text_length, self.max_label_length
      ),
      num_workers=num_workers,
      num_threads=threads,
      prefetch=prefetch,
    )

  def sample(self, count: int) -> list[tuple[Any, int, Record]]:
    """Returns about `count` records with their source and index there."""
    found = []
    for source, _, _, name in self.entries:
      reader = RecordReader(source, name)
      number = min(len(source), -(-count // len(self.entries)))
      for i in range(number):
        index = i * len(source) // number
        record = reader.read(index, lambda record: record)
        if not isinstance(record, BadRecord):
          found.append((source, index, record))
    return found


def config_load(config: Any) -> Load:
  """Returns what a training run with this config reads.

  Raises:
    UserError: the config is wrong.
  """
  # Here, because worker processes import this module.
  from narvl_jax.experiment import vocabulary as run_vocabulary
  from narvl_jax.experiment.config_checks import validate

  validate(config, fit=False)
  vocabulary = run_vocabulary.make_vocabulary(config)
  tasks = {
    name: make_task(name, vocabulary, dict(settings))
    for name, settings in config.tasks.items()
  }
  data = config.data
  return Load(
    load_mixture(config),
    tasks,
    image_size=tuple(data.image_size),
    max_text_length=data.max_text_length,
    max_label_length=data.max_label_length,
    batch_size=config.train.batch_size,
    num_threads=data.num_threads,
  )


def open_tsv(path: pathlib.Path) -> OfaTsvSource:
  """Opens a generated file, with its index of rows beside it.

  The index of a file in a store is in the cache of the user.
  """
  source = load_source(
    "ofa_tsv",
    task="vqa",
    split="train",
    path=str(path),
    index_dir="" if is_remote(path) else str(path.parent / "index"),
  )
  assert isinstance(source, OfaTsvSource)
  return source


def tsv_load(path: pathlib.Path, **settings: Any) -> Load:
  """Returns a generated file as a training run reads it.

  Args:
    path: file of `write_vqa_tsv`.
    **settings: fields of `Load`.
  """
  source = open_tsv(path)
  first = [source[i] for i in range(min(len(source), _VOCABULARY_RECORDS))]
  vocabulary = Vocabulary.train(vocabulary_texts("vqa", {}, first), 4000)
  task = make_task("vqa", vocabulary)
  return Load(
    [MixtureEntry(source, "vqa", 1.0, "tsv")], {"vqa": task}, **settings
  )


def make_tsv(
  folder: pathlib.Path, rows: int, width: int, height: int
) -> pathlib.Path:
  """Returns a generated file, written unless `folder` has it."""
  path = folder / f"vqa_{rows}_{width}x{height}.tsv"
  if not path.exists():
    with replacing(path) as temporary:
      write_vqa_tsv(temporary, rows, width=width, height=height)
  return path


def cpu_seconds() -> float:
  """Returns the CPU time of this process and its children, in seconds."""
  total = time.process_time()
  ticks = os.sysconf("SC_CLK_TCK")
  for pid in _children():
    with contextlib.suppress(OSError):
      # Fields 14 and 15 of proc(5), counted after the name, which may have
      # spaces.
      found = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
      total += sum(map(int, found.split()[11:13])) / ticks
  return total


def memory_bytes() -> tuple[int, int]:
  """Returns resident bytes of this process and of its children."""

  def resident(pid: int | str) -> int:
    with contextlib.suppress(OSError):
      pages = pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]
      return int(pages) * os.sysconf("SC_PAGE_SIZE")
    return 0

  return resident("self"), sum(resident(pid) for pid in _children())


def wait_until_idle() -> None:
  """Waits until processes and threads that read ahead are idle."""
  before = cpu_seconds()
  while True:
    time.sleep(_IDLE_SECONDS)
    after = cpu_seconds()
    if after - before < _IDLE_SECONDS / 10:
      return
    before = after


def _children() -> Iterator[int]:
  for process in multiprocessing.active_children():
    if process.pid is not None:
      yield process.pid
