"""`python -m narvl_jax.inspect`: what the queries did for one request."""

import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.example import Record
from narvl_jax.errors import UserError
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.inspect import inspect
from narvl_jax.inspection import picture
from narvl_jax.inspection.page import trace_page
from narvl_jax.inspection.trace import Trace, trace_request
from narvl_jax.prediction.predictor import Predictor
from narvl_jax.prediction.request import Request
from tests.evaluation import tiny_run
from tests.inspection import pages

_QUERIES = tiny_run.MODEL["num_queries"]


def _record(task: str, index: int = 0) -> Record:
  experiment, _ = tiny_run.tiny_model()
  return load_dataset(experiment.config, task, "test")[index]


@functools.cache
def _trace(task: str, target: str = "") -> Trace:
  return trace_request(*tiny_run.tiny_model(), _record(task), target)


@pytest.mark.parametrize("task", ["vqa", "grounding"])
def test_a_trace_agrees_with_the_prediction(task):
  trace = _trace(task)
  answer = Predictor(*tiny_run.tiny_model()).answer(_record(task))
  assert trace.answer == answer.value
  assert trace.probability == pytest.approx(answer.probability, rel=1e-3)
  assert len(trace.queries) == _QUERIES
  emitted = [x.word for x in trace.queries if x.word is not None]
  assert list(dict.fromkeys(emitted)) == list(range(len(trace.words)))
  if task == "grounding":
    # Neighbouring coordinates may be equal: nothing is merged.
    assert emitted == list(range(len(trace.words)))
  for query in trace.queries:
    name, probability = query.tokens[0]
    assert query.blank == (name == "blank") == (query.word is None)
    if query.word is not None:
      assert trace.words[query.word] == name
    found = [p for _, p in query.tokens]
    assert probability <= 1 + 1e-6
    assert found == sorted(found, reverse=True)
    # 32 pixels in patches of 8; the rest of the attention is on the text.
    assert query.attention.shape == (4, 4)
    assert 0 < query.looks < 1 + 1e-5
    assert query.looks == pytest.approx(query.attention.sum())


def test_the_alignment_of_a_target():
  trace = _trace("vqa", "red")
  assert trace.labels == ("red", "</s>")
  assert trace.posterior is not None
  assert trace.posterior.shape == (_QUERIES, 2)
  # Each label comes from one query or more, each query emits at most one.
  assert (trace.posterior.sum(0) >= 1 - 1e-4).all()
  assert (trace.posterior.sum(1) <= 1 + 1e-4).all()
  assert trace.target_probability is not None
  assert 0 <= trace.target_probability <= 1
  box = _trace("grounding", "0,0,32,32")
  corners = ("<bin_0>", "<bin_0>", "<bin_15>", "<bin_15>")
  assert box.labels == (*corners, "</s>")
  truth = max(_record("vqa").answers)
  assert "".join(_trace("vqa").labels) == truth.replace(" ", "") + "</s>"


def test_a_request_without_truth_has_no_alignment():
  record = dataclasses.replace(_record("vqa"), answers={})
  trace = trace_request(*tiny_run.tiny_model(), record)
  assert trace.posterior is None
  text, _ = pages.read(trace_page(trace, "title", "command"))
  assert "no target was given, and the truth is not known (--target)" in text


@pytest.mark.parametrize(
  ("task", "target", "message"),
  [
    (
      "vqa",
      "red red red red red",
      r'--target="red .*": it needs 10 queries, the',
    ),
    ("grounding", "1,2", r'--target="1,2": a box has four numbers in pixels'),
    ("entailment", "yess", r'--target="yess": .* Did you mean "yes"\?'),
  ],
)
def test_targets_that_cannot_be_aligned(task, target, message):
  with pytest.raises(UserError, match=message):
    _trace(task, target)


def test_an_autoregressive_run_has_no_queries():
  experiment, variables = tiny_run.tiny_model()
  config = experiment.config.copy_and_resolve_references()
  config.model.decoder = "autoregressive"
  other = dataclasses.replace(experiment, config=config)
  with pytest.raises(UserError, match=r"model.decoder=autoregressive, which"):
    trace_request(other, variables, _record("vqa"))


def test_the_command_writes_a_picture_and_a_page(tmp_path, capsys):
  photo = tmp_path / "photo.png"
  noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(noise).save(photo)
  to = tmp_path / "new" / "folder"
  request = Request("vqa", image=photo, prompt="what color? " + pages.HOSTILE)
  paths = inspect(tiny_run.tiny_run(), request, to, target="red")
  assert [x.name for x in paths] == ["inspection.png", "inspection.html"]
  assert f"wrote {to / 'inspection.html'}" in capsys.readouterr().out
  with Image.open(paths[0]) as drawn:
    # All queries are in one row, below the picture.
    assert drawn.size == (8 * 124 + 24, 224 + 24 + 112 + 5 * 17 + 24)
  text, images = pages.read(paths[1].read_text(encoding="utf-8"))
  assert "what color? <script>alert(1)</script>" in text
  assert f"step {tiny_run.STEP}: vqa" in text
  trace = _trace("vqa", "red")
  assert "target red | </s> (" in text
  assert len(images) <= 1 + _QUERIES
  assert len(trace.queries) == _QUERIES


def test_heat_maps_are_coloured_where_the_attention_is():
  image = np.full((32, 64, 3), 200, np.uint8)
  attention = np.zeros((2, 4), np.float32)
  attention[0, 3] = 0.01
  drawn = np.asarray(picture.heat_map(image, attention, 64), int)
  assert drawn.shape == (32, 64, 3)
  redness = drawn[..., 0] - drawn[..., 2]
  assert redness[2, 61] > 100
  assert redness[30, 2] == 0
