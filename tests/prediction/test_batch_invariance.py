"""An answer depends neither on its batch nor on the number of devices."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax.linen import meta
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax import parallel
from narvl_jax.checkpointing.runs import build_in
from narvl_jax.data.example import Record
from narvl_jax.decoding import Decoding
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.prediction.predictor import Answer, Predictor
from tests.evaluation import tiny_run

REQUESTS = 5
_BEAM = Decoding("beam", beam_size=3, num_best=2)
_CONSTRAINED = dataclasses.replace(_BEAM, constrained=True)
# Model, task and decoding.
CASES = {
  "greedy": ("parallel", "grounding", Decoding()),
  "greedy-constrained": (
    "parallel",
    "entailment",
    Decoding(constrained=True),
  ),
  "beam": ("parallel", "vqa", _BEAM),
  "beam-constrained": ("parallel", "grounding", _CONSTRAINED),
  "candidates": ("parallel", "entailment", Decoding("candidates", num_best=3)),
  "autoregressive-greedy": ("autoregressive", "vqa", Decoding()),
  "autoregressive-beam": ("autoregressive", "caption", _BEAM),
  "autoregressive-candidates": (
    "autoregressive",
    "entailment",
    Decoding("candidates"),
  ),
}


@functools.cache
def model(decoder: str) -> tuple[Experiment, Any]:
  if decoder == "parallel":
    return tiny_run.tiny_model()
  config = tiny_run.tiny_config().copy_and_resolve_references()
  config.model.decoder = decoder
  experiment = build_in(config, tiny_run.tiny_run())
  rng = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(x.dtype),
    meta.unbox(experiment.abstract_variables()),
  )
  return experiment, variables


@functools.cache
def predictor(case: str, devices: int = 1) -> Predictor:
  decoder, task, decoding = CASES[case]
  experiment, variables = model(decoder)
  if devices > 1:
    everywhere = NamedSharding(parallel.make_mesh(devices), PartitionSpec())
    variables = jax.device_put(variables, everywhere)
  return Predictor(experiment, variables, {task: decoding})


@functools.cache
def records(task: str, first: int, count: int) -> list[Record]:
  source = load_dataset(tiny_run.tiny_config(), task, "test")
  return [source[i] for i in range(first, first + count)]


def numbers(found: Answer) -> tuple[Any, ...]:
  """Returns all that was computed for a request."""
  return found[2:]


@functools.cache
def alone(case: str) -> list[tuple[Any, ...]]:
  own = records(CASES[case][1], 0, REQUESTS)
  return [numbers(predictor(case).answer(record)) for record in own]


def batched(case: str, asked: list[Record], size: int, devices: int = 1) -> Any:
  task = CASES[case][1]
  found = predictor(case, devices).answers(asked, task, batch_size=size)
  return [numbers(answer) for answer in found]


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("size", [3, 64])
def test_any_batch_size_gives_the_numbers_of_one(case, size):
  own = records(CASES[case][1], 0, REQUESTS)
  found = batched(case, own, size)
  assert found == alone(case)
  # Otherwise the test would be one of constants.
  assert len(set(found)) == REQUESTS or "candidates" in case


@pytest.mark.parametrize("case", ["greedy", "beam", "autoregressive-beam"])
def test_rows_and_neighbours_change_no_bit(case):
  task = CASES[case][1]
  for place, first in ((0, 100), (1, 200), (3, 300)):
    others = records(task, first, 8 - REQUESTS)
    own = records(task, 0, REQUESTS)
    found = batched(case, [*others[:place], *own, *others[place:]], 8)
    assert found[place : place + REQUESTS] == alone(case)


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
  ("case", "size"),
  [
    ("greedy", 64),
    ("beam", 1),
    ("beam-constrained", 8),
    ("candidates", 3),
    ("autoregressive-greedy", 64),
    ("autoregressive-beam", 8),
  ],
)
def test_eight_devices_give_the_answers_of_one(case, size):
  own = records(CASES[case][1], 0, REQUESTS)
  found = batched(case, own, size, devices=8)
  for (value, log_prob, others, *_), expected in zip(
    found, alone(case), strict=True
  ):
    assert value == expected[0]
    assert [x for x, _ in others] == [x for x, _ in expected[2]]
    # Sums that may be split over devices are compiled in another order.
    np.testing.assert_allclose(
      [log_prob, *(x for _, x in others)],
      [expected[1], *(x for _, x in expected[2])],
      rtol=1e-6,
      atol=1e-6,
    )
