"""An answer does not depend on the other requests of its batch."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from narvl_jax import parallel
from narvl_jax.data.example import Record
from narvl_jax.decoding import Decoding
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.prediction.predictor import Answer, Predictor
from tests.evaluation import tiny_run

REQUESTS = 5
DECODINGS = {"beam": Decoding("beam", beam_size=3), "greedy": Decoding()}


@functools.cache
def predictor(task: str, method: str, devices: int = 1) -> Predictor:
  experiment, variables = tiny_run.tiny_model()
  if devices > 1:
    everywhere = NamedSharding(parallel.make_mesh(devices), PartitionSpec())
    variables = jax.device_put(variables, everywhere)
  return Predictor(experiment, variables, {task: DECODINGS[method]})


@functools.cache
def records(task: str, first: int, count: int) -> list[Record]:
  experiment, _ = tiny_run.tiny_model()
  source = load_dataset(experiment.config, task, "test")
  return [source[i] for i in range(first, first + count)]


@functools.cache
def alone(task: str, method: str) -> list[Answer]:
  one = predictor(task, method)
  return [one.answer(record) for record in records(task, 0, REQUESTS)]


def check(found: list[Answer], task: str, method: str) -> None:
  for answer, expected in zip(found, alone(task, method), strict=True):
    assert answer.value == expected.value
    # Programs of other shapes add in another order.
    np.testing.assert_allclose(
      answer.log_prob, expected.log_prob, rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("task", ["vqa", "grounding"])
@pytest.mark.parametrize("method", list(DECODINGS))
@pytest.mark.parametrize("size", [3, 8, 64])
def test_any_batch_size_gives_the_answer_of_one(task, method, size):
  found = predictor(task, method).answers(
    records(task, 0, REQUESTS), task, batch_size=size
  )
  check(list(found), task, method)


@pytest.mark.parametrize("task", ["vqa", "grounding"])
def test_rows_and_neighbours_change_no_bit(task):
  one, own = predictor(task, "greedy"), records(task, 0, REQUESTS)

  def at(place: int, first: int) -> list[tuple]:
    batch = records(task, first, 8 - REQUESTS)
    batch = [*batch[:place], *own, *batch[place:]]
    found = list(one.answers(batch, task, batch_size=8))
    return [
      (x.value, x.log_prob, x.query_entropy, x.probability_iou50)
      for x in found[place : place + REQUESTS]
    ]

  expected = at(0, 100)
  for place, first in ((1, 200), (2, 300), (3, 400)):
    assert at(place, first) == expected


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 devices")
@pytest.mark.parametrize("size", [1, 8, 64])
def test_eight_devices_give_the_answer_of_one(size):
  found = predictor("vqa", "greedy", 8).answers(
    records("vqa", 0, REQUESTS), "vqa", batch_size=size
  )
  check(list(found), "vqa", "greedy")
