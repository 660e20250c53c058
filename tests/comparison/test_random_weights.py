"""Workloads of random weights: timed programs must emit whole answers."""

import dataclasses

import pytest

from narvl_jax.comparison import random_weights
from narvl_jax.comparison.random_weights import WORKLOADS
from narvl_jax.decoding import AutoregressiveReader, ParallelReader


@pytest.mark.parametrize("task", ["vqa", "grounding", "entailment"])
def test_answers_of_a_task_are_allowed(task):
  case = random_weights.make_case(
    "micro",
    task,
    dataclasses.replace(WORKLOADS[task], image_size=32, text_length=16),
    beam_size=2,
    wanted=("ar-beam", "nar-constrained"),
    uncached=False,
  )
  # The official beam search over boxes may emit any token.
  labels = ("AR beam 2", "NAR constrained")[task == "grounding" :]
  for label in labels:
    reader = case.programs[label].reader
    assert isinstance(reader, (AutoregressiveReader, ParallelReader))
    assert reader.answers is not None
    tokens = {*reader.answers.tokens, *sum(reader.answers.sequences, ())}
    forbidden = reader.classes.mask()
    assert tokens
    assert forbidden is None or not forbidden[list(tokens)].any()
