"""Traces the queries of a parallel model for one request."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from narvl_jax.data.example import Box, Record
from narvl_jax.data.pictures import images
from narvl_jax.data.tasks import Task
from narvl_jax.data.tasks.base import required_queries
from narvl_jax.decoding import (
  Classes,
  Decoding,
  ParallelReader,
  greedy_decode,
)
from narvl_jax.decoding.ctc import masked_log_probs
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.models.narvl import NARVL, cross_attention
from narvl_jax.prediction.readers import make_reader
from narvl_jax.query_ctc import label_posterior, query_ctc_loss

_TOP = 5
_BLANK = "blank"


@dataclasses.dataclass(frozen=True)
class Query:
  """One query of the decoder.

  Attributes:
    tokens: the likeliest tokens and their probabilities, best first.
    blank: whether the likeliest token is blank.
    word: index in `Trace.words` of the token that it emits; None for blank.
    attention: float32 [h, w], share of each image token in the
      cross-attention of the last decoder layer, averaged over heads.
    looks: sum of `attention`; the rest of 1 is on the text.
  """

  tokens: tuple[tuple[str, float], ...]
  blank: bool
  word: int | None
  attention: np.ndarray
  looks: float


@dataclasses.dataclass(frozen=True)
class Trace:
  """The alignment and the attention behind an answer.

  Attributes:
    record: the request, with a decoded picture.
    answer: greedy answer: text, or a box in pixels.
    probability: probability of the answer.
    queries: the queries in order.
    words: tokens of the answer after merging and removal of blanks.
    labels: tokens of the target; () without a target.
    posterior: float32 [N, L], probability that a query emits a label, given
      the target; see `query_ctc.label_posterior`. None without a target.
    target_probability: probability of the target, summed over its
      alignments; None without one.
    note: why there is no posterior, or "".
  """

  record: Record
  answer: str | Box
  probability: float
  queries: tuple[Query, ...]
  words: tuple[str, ...]
  labels: tuple[str, ...] = ()
  posterior: np.ndarray | None = None
  target_probability: float | None = None
  note: str = ""


def trace_request(
  experiment: Experiment, variables: Any, record: Record, target: str = ""
) -> Trace:
  """Runs the model once and returns what each query did.

  Args:
    experiment: the run.
    variables: variables of `experiment.model`, unboxed.
    record: the request, with a decoded picture.
    target: text, or a box as "x0,y0,x1,y1" in pixels, whose alignment is
      computed; "" uses the truth of the record, if it is known.

  Raises:
    UserError: the model is autoregressive, or the target cannot be encoded or
      needs more queries than there are.
  """
  if experiment.autoregressive:
    raise UserError(
      "this run has model.decoder=autoregressive, which has no queries to"
      " inspect; give the --workdir of a run with model.decoder=parallel"
    )
  task = experiment.tasks[record.task]
  labels, note = _labels(experiment, task, record, target)
  reader = make_reader(experiment, task.name, Decoding())
  assert isinstance(reader, ParallelReader)
  logits, attention, log_probs, best = _forward(
    experiment, variables, record, reader.classes
  )
  answer_ids = best["ids"][0, : best["lengths"][0]].tolist()
  trace = Trace(
    record,
    task.decode(answer_ids, images.original_size(record.image)),
    math.exp(float(best["log_prob"][0])),
    _queries(experiment, log_probs, attention, task.merge_repeats),
    tuple(_name(experiment, i) for i in answer_ids),
    note=note,
  )
  return _with_alignment(experiment, trace, logits, labels) if labels else trace


def _forward(
  experiment: Experiment, variables: Any, record: Record, classes: Classes
) -> Any:
  """Returns the results of `_program` for one request."""
  task = experiment.tasks[record.task]
  batcher = experiment.batcher
  batch = batcher.empty(1)
  batcher.put(batch, 0, batcher.prepare(record, task, target="none"))
  # The cache of `functools` hides the parameters' types.
  make: Any = _program
  return make(experiment.model, classes)(
    variables,
    batch["image"],
    batch["text"],
    batch["image_mask"],
    np.asarray([task.merge_repeats]),
  )


@functools.lru_cache(maxsize=4)
def _program(model: NARVL, classes: Classes) -> Callable[..., Any]:
  """Returns the compiled forward pass and greedy decoding of one request.

  Its results are logits [1, N, V], attention to the picture [N, h, w],
  log-probabilities [N, V] without the classes that are never predicted, and
  the result of `greedy_decode`.
  """
  assert classes.blank_id is not None
  mask: dict[str, Any] = {
    "forbidden": classes.mask(),
    "vocab_size": classes.vocab_size,
  }
  ids = {"blank_id": classes.blank_id, "pad_id": classes.pad_id}

  def program(
    variables: Any,
    image: jax.Array,
    text: jax.Array,
    image_mask: jax.Array,
    merge_repeats: jax.Array,
  ) -> Any:
    (logits, outputs), collected = model.apply(
      variables, image, text, image_mask=image_mask, mutable=["intermediates"]
    )
    height, width = outputs["image_features"].shape[1:3]
    weights = cross_attention(collected["intermediates"])[-1, 0].mean(0)
    attention = weights[:, : height * width].reshape(-1, height, width)
    log_probs = masked_log_probs(logits, **mask)[0]
    best = greedy_decode(logits, merge_repeats, **ids, **mask)
    return logits, attention, log_probs, best

  compiled = jax.jit(program)
  return lambda *arguments: jax.device_get(compiled(*arguments))


@functools.partial(jax.jit, static_argnames=("blank_id", "vocab_size"))
def _alignment(
  logits: jax.Array, labels: jax.Array, *, blank_id: int, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
  """Returns loss [1] and posterior [1, N, L] of labels [1, L]."""
  arguments = logits, labels, jnp.asarray([labels.shape[1]], jnp.int32)
  ids: Any = {"blank_id": blank_id, "vocab_size": vocab_size}
  return query_ctc_loss(*arguments, **ids), label_posterior(*arguments, **ids)


def _queries(
  experiment: Experiment,
  log_probs: np.ndarray,
  attention: np.ndarray,
  merge_repeats: bool,
) -> tuple[Query, ...]:
  """Returns the queries with the words that they emit.

  Args:
    experiment: the run.
    log_probs: [N, V].
    attention: [N, h, w].
    merge_repeats: whether equal neighbours are one token.
  """
  blank_id = experiment.vocabulary.blank_id
  queries, word, previous = [], -1, blank_id
  for row, looked in zip(log_probs, attention, strict=True):
    order = np.argsort(-row, kind="stable")[:_TOP].tolist()
    is_blank = order[0] == blank_id
    if not is_blank and not (merge_repeats and order[0] == previous):
      word += 1
    previous = order[0]
    tokens = ((_name(experiment, i), float(np.exp(row[i]))) for i in order)
    queries.append(
      Query(
        tuple(tokens),
        is_blank,
        None if is_blank else word,
        looked,
        float(looked.sum()),
      )
    )
  return tuple(queries)


def _with_alignment(
  experiment: Experiment, trace: Trace, logits: jax.Array, labels: list[int]
) -> Trace:
  """Adds the alignment of a target, of the same logits as in training."""
  loss, posterior = _alignment(
    logits,
    np.asarray([labels], np.int32),
    blank_id=experiment.vocabulary.blank_id,
    vocab_size=experiment.model_config.vocab_size,
  )
  return dataclasses.replace(
    trace,
    labels=tuple(_name(experiment, i) for i in labels),
    posterior=np.asarray(posterior[0]),
    target_probability=math.exp(-float(loss[0])),
  )


def _labels(
  experiment: Experiment, task: Task[Any], record: Record, target: str
) -> tuple[list[int], str]:
  """Returns the ids of the target, or [] and the reason.

  Raises:
    UserError: a given target cannot be encoded or aligned.
  """
  if not target and record.box is None and not record.answers:
    return [], "no target was given, and the truth is not known (--target)"
  name = f'--target="{target}"' if target else "the truth"
  try:
    if target:
      record = _with_target(record, target)
    labels = task.encode(record).label_ids
    needed = required_queries(labels)
    if needed > experiment.model_config.num_queries:
      raise UserError(
        f"it needs {needed} queries, the model has"
        f" {experiment.model_config.num_queries}; give a shorter one"
      )
  except UserError as error:
    if target:
      raise UserError(f"{name}: {error}") from error
    return [], f"{name} has no alignment: {error}"
  return labels, ""


def _with_target(record: Record, target: str) -> Record:
  if record.task != "grounding":
    return dataclasses.replace(record, answers={target: 1.0})
  try:
    x0, y0, x1, y1 = map(float, target.split(","))
  except ValueError as error:
    raise UserError(
      "a box has four numbers in pixels, such as 10,20,30,40"
    ) from error
  return dataclasses.replace(record, box=(x0, y0, x1, y1))


def _name(experiment: Experiment, index: int) -> str:
  """Returns a token as text; blanks, specials and bins by their names."""
  vocabulary = experiment.vocabulary
  if index == vocabulary.blank_id:
    return _BLANK
  return vocabulary.decode([index]).strip() or vocabulary.symbol(index)
