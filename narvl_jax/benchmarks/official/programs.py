"""What is timed: the operations of our model and of the official one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from narvl_jax.benchmarks.workloads import Workload
from narvl_jax.data.example import TASKS
from narvl_jax.decoding import Decoding, Inputs, make_steps, prepare_variables
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.parallel import mesh_from_config, shard_batch
from narvl_jax.prediction.readers import make_reader
from narvl_jax.training.setup import build_setup

DROPOUT, LEARNING_RATE = 0.1, 5e-5
Calls = dict[str, Callable[[], Any]]


def make_labels(load: Workload, batch_size: int, eos_id: int) -> np.ndarray:
  """Returns labels int32 [B, L] that the queries can express."""
  ids = 100 + np.arange(batch_size * load.answer_length)
  labels = ids.reshape(batch_size, -1)[:, : load.queries - 1]
  return np.pad(labels, ((0, 0), (0, 1)), constant_values=eos_id).astype(
    np.int32
  )


def _pixels(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """Returns float32 [B, H, W, 3] in [-1, 1]."""
  return batch["image"].astype(np.float32) / np.float32(127.5) - 1


def ours(
  experiment: Experiment,
  task: str,
  variables: Any,
  batch: Mapping[str, np.ndarray],
) -> Calls:
  """Returns our programs, as `predict` runs them, and the logits."""
  model, prepared = (
    experiment.model,
    prepare_variables(experiment.model, variables),
  )
  reader: Any = make_reader(experiment, task, Decoding())
  steps = make_steps(model, reader)
  inputs = (_pixels(batch), batch["text"], batch["image_mask"])
  lengths = np.zeros(2, np.int32)
  rest: Any = Inputs(batch["text"], batch["merge_repeats"], lengths)  # pyright: ignore[reportArgumentType]
  encoded: list[Any] = []

  def encode() -> Any:
    encoded[:] = [jax.block_until_ready(steps.encode(prepared, *inputs))]
    return encoded[0]

  return {
    "encoder": encode,
    "decoder": lambda: steps.decode(prepared, encoded[0], rest),
    "whole": lambda: steps.predict(
      prepared, *inputs, batch["merge_repeats"], lengths
    ),
    "logits": lambda: jax.jit(
      lambda v, *x: model.apply(v, *x[:2], image_mask=x[2])[0]
    )(variables, *inputs),
  }


def official(
  model: Any,
  batch: Mapping[str, np.ndarray],
  compile_: Callable[[Any], Any] | None = None,
) -> Calls:
  """Returns the same of the official model.

  Args:
    model: in evaluation mode.
    batch: of `make_batch`.
    compile_: such as `torch.compile`; None to run the model as it is.
  """
  import torch

  tensors = _tensors(batch)
  wrap = compile_ or (lambda module: module)
  encoder, decoder = wrap(model.encoder), wrap(model.decoder)
  encoded: list[Any] = []

  def encode() -> Any:
    with torch.no_grad():
      encoded[:] = [encoder(**tensors)]
    return None

  def decode() -> Any:
    with torch.no_grad():
      log_probs, _ = decoder(
        normalize=True, prev_output_tokens=None, encoder_out=encoded[0]
      )
      return log_probs.max(-1)

  def logits() -> np.ndarray:
    encode()
    with torch.no_grad():
      found, _ = decoder(
        normalize=False, prev_output_tokens=None, encoder_out=encoded[0]
      )
    return found.numpy()

  def whole() -> Any:
    encode()
    return decode()

  return {
    "encoder": encode,
    "decoder": decode,
    "whole": whole,
    "logits": logits,
  }


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  import torch

  size, length = batch["text"].shape
  return {
    "src_tokens": torch.tensor(batch["text"], dtype=torch.int64),
    "src_lengths": torch.full((size,), length),
    "patch_images": torch.tensor(_pixels(batch)).permute(0, 3, 1, 2),
    "patch_masks": torch.tensor(batch["image_mask"]),
  }


def our_update(
  experiment: Experiment,
  variables: Any,
  task: str,
  batch: Mapping[str, np.ndarray],
  labels: np.ndarray,
) -> Callable[[], Any]:
  """Returns our update, as `train` runs it, from given weights."""
  mesh = mesh_from_config(experiment.config.mesh, jax.devices()[:1])
  setup = build_setup(experiment, mesh)
  size, length = labels.shape
  width = experiment.label_length
  rows = {
    **{name: batch[name] for name in ("image", "text", "image_mask")},
    "labels": np.pad(labels, ((0, 0), (0, width - length))),
    "label_length": np.full(size, length, np.int32),
    "confidence": np.ones(size, np.float32),
    "task": np.full(size, TASKS.index(task), np.int32),
    "valid": np.ones(size, bool),
  }
  arrays = shard_batch(rows, mesh)
  state = setup.init(jax.random.key(0))
  boxes = [
    state.replace(
      **{
        name: jax.tree.map(jax.numpy.array, variables[name])
        for name in ("params", "batch_stats")
      }
    )
  ]
  step = functools.partial(setup.compile_step(), setup.read_inputs())

  def update() -> Any:
    boxes[0], metrics = step(boxes[0], arrays)
    return metrics

  return update


def official_update(
  model: Any,
  batch: Mapping[str, np.ndarray],
  labels: np.ndarray,
  blank_id: int,
  compile_: Callable[[Any], Any] | None,
) -> Callable[[], Any]:
  """Returns an update of the official model.

  The loss is that of `criterions/ofa_nat_loss.py` without label smoothing.
  """
  import torch

  tensors = _tensors(batch)
  targets = torch.tensor(labels, dtype=torch.int64)
  optimizer = torch.optim.AdamW(
    model.parameters(), LEARNING_RATE, weight_decay=0.01
  )
  run = compile_(model) if compile_ else model

  def update() -> Any:
    optimizer.zero_grad()
    outputs = run(**tensors, prev_output_tokens=None, tgt_tokens=targets)
    logits = outputs["word_ins"]["out"]
    size, queries, _ = logits.shape
    loss = torch.nn.functional.ctc_loss(
      torch.log_softmax(logits, -1).transpose(0, 1),
      targets,
      torch.full((size,), queries),
      torch.full((size,), targets.shape[1]),
      blank=blank_id,
      reduction="mean",
      zero_infinity=True,
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()

  return update
