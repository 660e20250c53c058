"""`Answer.loss`: the negative log-probability of the true answer."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.data.batches.batching import Batcher
from narvl_jax.models.autoregressive import make_prompt, teacher_forcing
from narvl_jax.prediction.predictor import Predictor
from tests.prediction.test_batch_invariance import model, predictor, records


def test_it_is_that_of_the_candidate():
  found = list(
    predictor("candidates").answers(
      records("entailment", 0, 5), "entailment", batch_size=3
    )
  )
  for answer in found:
    (truth,) = answer.record.answers
    scores = {answer.value: answer.log_prob} | dict(answer.alternatives)
    assert answer.loss == pytest.approx(-scores[truth], rel=1e-5)
  assert any(answer.value not in answer.record.answers for answer in found)


def test_of_an_autoregressive_model_it_is_by_teacher_forcing():
  experiment, variables = model("autoregressive")
  network: Any = experiment.model
  record = records("caption", 0, 1)[0]
  data = experiment.config.data
  batcher = Batcher(
    tuple(data.image_size), data.max_text_length, experiment.label_length
  )
  batch = batcher.empty(1)
  task = experiment.tasks["caption"]
  batcher.write(batch, 0, record, task, target="required")
  vocabulary = experiment.vocabulary
  prompt = make_prompt(jnp.asarray(batch["text"]), False, vocabulary.pad_id)
  labels, length = batch["labels"], int(batch["label_length"][0])
  inputs, _ = teacher_forcing(
    prompt, jnp.asarray(labels), jnp.asarray([length]), vocabulary.pad_id
  )
  logits, _ = network.apply(
    variables, batch["image"], batch["text"], inputs, image_mask=None
  )
  logits = np.array(logits[0], np.float64)
  size = experiment.model_config.vocab_size
  logits[:, :size][:, vocabulary.forbidden[:size]] = -np.inf
  logits[:, size:] = -np.inf
  log_probs = jax.nn.log_softmax(logits)
  expected = -sum(log_probs[i, labels[0, i]] for i in range(length))
  answer = predictor("autoregressive-beam").answer(record)
  assert answer.loss == pytest.approx(float(expected), rel=1e-5)


def test_without_a_truth_there_is_none():
  experiment, variables = model("parallel")
  record = dataclasses.replace(records("caption", 0, 1)[0], answers={})
  assert Predictor(experiment, variables).answer(record).loss is None


def test_an_answer_that_needs_too_many_queries_has_a_finite_loss():
  experiment, variables = model("parallel")
  words = " ".join(["red blue"] * 6)
  record = records("caption", 0, 1)[0]
  record = dataclasses.replace(record, answers={words: 1.0})
  assert Predictor(experiment, variables).answer(record).loss == 1e9
