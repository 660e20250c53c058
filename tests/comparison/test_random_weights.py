"""Workloads of random weights: timed programs must emit whole answers."""

import dataclasses

import jax
import pytest

from narvl_jax.ahead_of_time.costs import Line
from narvl_jax.ahead_of_time.program import Program
from narvl_jax.ahead_of_time.topology import CHIPS, Topology
from narvl_jax.benchmarks.workloads import WORKLOADS
from narvl_jax.comparison import comparison, compiled, random_weights
from narvl_jax.comparison.options import Options
from narvl_jax.comparison.ways import AR, DEEP
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


def test_twin_with_one_decoder_layer_has_the_other_layers_in_its_encoder():
  case = random_weights.make_case(
    "micro",
    "grounding",
    dataclasses.replace(WORKLOADS["grounding"], image_size=32, text_length=16),
    beam_size=2,
    wanted=("ar-deep-beam",),
    uncached=False,
    dtype="bfloat16",
    shapes_only=True,
  )
  assert list(case.programs) == ["AR greedy", "AR deep beam 2", "NAR greedy"]
  assert set(case.encoders) == {"shared", "deep"}
  one, deep = case.models[AR].network, case.models[DEEP].network
  depths = [
    (network.model.config.encoder_layers, network.model.config.decoder_layers)
    for network in (one, deep)
  ]
  assert depths == [(2, 2), (4, 1)]
  # Prepared as on one device: split by layer, and cast.
  layers = deep.variables["params"]["decoder"]["layers"]
  assert len(layers) == 1
  assert layers[0]["self_attn"]["qkv"]["kernel"].dtype == "bfloat16"


def test_estimates_for_a_chip(monkeypatch, capsys):
  """The compiler is replaced: every program takes 3 ms a pass."""
  program = Program(
    (), (Line("f", "fusion", "", "", 1, 4.5e6, 0.0, 1e9),), {}, 1
  )
  trips = []

  def read(text, unknown_trips):
    trips.append(unknown_trips)
    lines = [
      dataclasses.replace(program.lines[0], cycles=4.5e6 * unknown_trips)
    ]
    return dataclasses.replace(program, lines=tuple(lines))

  monkeypatch.setattr(compiled, "read_program", read)
  monkeypatch.setattr(
    comparison,
    "get_topology",
    lambda name: Topology(name, 1, CHIPS["v5e"], jax.devices()),
  )
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: _Compiled())
  report = comparison.compare(
    Options(
      size="micro",
      topology="v5e:2x2",
      tasks=("grounding",),
      image_size=32,
      batch_sizes=(1,),
      ways=("ar-greedy",),
    )
  )
  found = report["tasks"]["grounding"]["ways"]["AR greedy"]["estimates"]["1"]
  # The encoder, then four coordinates and eos, then the parallel decoder.
  assert trips == [1, 5, 1]
  assert found["encoder_ms"] == pytest.approx(3)
  assert (found["passes"], found["tokens_per_pass"]) == (5, 1)
  assert found["decoder_ratio"] == pytest.approx(5)
  assert found["whole_ratio"] == pytest.approx((3 + 15) / (3 + 3))
  out = capsys.readouterr().out
  assert "tokens a pass" in out
  assert "AR greedy         3.00       15.00       5" in out


class _Compiled:
  def as_text(self):
    return ""
