"""Batches of sources, with shapes given one by one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from narvl_jax.data.batches import pipeline
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.batches.mixture import Mixture
from narvl_jax.data.example import Record


def train_batches(
  entries: Sequence[MixtureEntry],
  tasks: Mapping[str, Any],
  position: int,
  *,
  batch_size: int,
  seed: int,
  rows: Sequence[int] | None = None,
  temperature: float = 0.0,
  image_size: tuple[int, int],
  max_text_length: int,
  max_label_length: int,
  **reading: Any,
) -> pipeline.TrainBatches:
  mixture = Mixture(
    entries,
    batch_size=batch_size,
    seed=seed,
    rows=rows,
    temperature=temperature,
  )
  batcher = pipeline.Batcher(image_size, max_text_length, max_label_length)
  return pipeline.train_batches(mixture, tasks, position, batcher, **reading)


def eval_batches(
  source: Sequence[Record],
  task: Any,
  *,
  image_size: tuple[int, int],
  max_text_length: int,
  max_label_length: int,
  **reading: Any,
) -> Iterator[tuple[pipeline.Batch, list[Record]]]:
  batcher = pipeline.Batcher(image_size, max_text_length, max_label_length)
  return pipeline.eval_batches(source, task, batcher, **reading)
