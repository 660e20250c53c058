"""Tests of `python -m narvl_jax.compare`."""

import dataclasses
import json
import re
import shutil

import pytest

from narvl_jax.checkpointing.runs import load_run
from narvl_jax.checkpointing.writing import Checkpoints
from narvl_jax.comparison import comparison
from narvl_jax.comparison.case import choose_lengths
from narvl_jax.comparison.options import Options
from narvl_jax.comparison.runs import make_case, open_runs
from narvl_jax.errors import UserError
from tests.comparison import tiny_pair


def compare(*args, **kwargs):
  return comparison.compare(Options(*args, **kwargs))


WAYS = ("ar-greedy", "ar-uncached", "nar-constrained")


@pytest.fixture(scope="module")
def pair():
  return {
    "nar": str(tiny_pair.parallel_run()),
    "ar": str(tiny_pair.autoregressive_run()),
  }


def test_runs_are_compared(pair, tmp_path, capsys):
  report = compare(
    **pair,
    tasks=("entailment",),
    max_examples=2,
    batch_sizes=(2,),
    rounds=2,
    lengths=(3,),
    beam_size=2,
    ways=WAYS,
    uncached=True,
    to=str(tmp_path / "results"),
  )
  folder = tmp_path / "results"
  saved = json.loads((folder / "comparison.json").read_text())
  assert saved == json.loads(json.dumps(report))
  assert (folder / "latency.png").stat().st_size > 1000
  assert saved["models"]["AR"]["run"] == pair["ar"]
  assert (
    saved["models"]["NAR"]["vocabulary"]
    == (saved["models"]["AR"]["vocabulary"])
  )
  ways = saved["tasks"]["entailment"]["ways"]
  assert list(ways) == [
    "AR greedy",
    "AR uncached",
    "NAR greedy",
    "NAR constrained",
  ]
  for label, way in ways.items():
    times = way["latency"]["2"]
    whole = zip(
      *(times[f"{part}_ms"]["rounds"] for part in ("encoder", "decoder")),
      times["whole_ms"]["rounds"],
      strict=True,
    )
    assert all(abs(a + b - c) < 0.01 for a, b, c in whole)
    assert times["memory"]["output"] > 0
    if label != "AR uncached":
      assert way["quality"]["examples"] == 2
      assert list(way["quality"]["metrics"]) == ["accuracy"]
      main = way["quality"]["metrics"]["accuracy"]
      assert ("difference" in way["quality"]) == (label != "NAR greedy")
      if label != "NAR greedy":
        found = way["quality"]["difference"]["accuracy"]
        assert (found["first"], found["examples"]) == (main, 2)
        assert found["difference"] == found["first"] - found["second"]
        baseline = ways["NAR greedy"]["quality"]["metrics"]["accuracy"]
        assert found["second"] == baseline
  passes = {k: way["latency"]["2"]["passes"] for k, way in ways.items()}
  assert passes["NAR greedy"] == passes["NAR constrained"] == 1
  # The same answers, found without a cache.
  assert passes["AR greedy"] == passes["AR uncached"] > 1
  assert ways["NAR greedy"]["latency"]["2"]["decoder_ratio"] == 1
  curves = saved["lengths"]["curves"]
  assert list(curves) == [
    "AR greedy",
    "AR beam 2",
    "NAR greedy, 8 queries",
    "NAR greedy, a query a token",
  ]
  assert all(curve["lengths"] == [3] for curve in curves.values())
  out = capsys.readouterr().out
  assert "NAR constrained" in out
  assert re.search(r"minus NAR greedy .*\n-+\nAR greedy .* [+-][\d.]+ \[", out)
  for line in (
    "minus NAR greedy: difference on the same examples, in points",
    "ms: medians of 2 rounds, the 95th percentile in brackets",
    "decoder x, whole x: time over that of NAR greedy",
  ):
    assert f"\n{line}" in out
  # It takes minutes, and reports its stages.
  for what in ("answers of AR greedy", "times at batch 2, 2 rounds"):
    assert f"s] entailment: {what}\n" in out


def test_random_weights_emit_as_many_tokens_as_the_answers(capsys):
  report = compare(
    size="micro",
    tasks=("grounding",),
    image_size=32,
    batch_sizes=(1,),
    rounds=1,
    lengths=(),
    ways=("ar-greedy", "ar-candidates"),
  )
  ways = report["tasks"]["grounding"]["ways"]
  # Four coordinates and eos.
  assert ways["AR greedy"]["latency"]["1"]["passes"] == 5
  assert ways["NAR greedy"]["latency"]["1"]["passes"] == 1
  assert "n/a, there is no list of the answers" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, "--nar=RUN is missing"),
    ({"nar": "a"}, "--ar=RUN is missing"),
    ({"nar": "a", "ar": "b"}, '"a" has no run.*--nar=RUN'),
    ({"nar": "a", "size": "base"}, "--size=base has random weights"),
    ({"size": "bse"}, '--size="bse" is unknown. Did you mean "base"'),
    ({"size": "micro", "tasks": ["vqq"]}, 'no task "vqq". Did you mean "vqa"'),
    ({"size": "micro", "image_size": 30}, "nearest: --image_size=32"),
    ({"size": "micro", "rounds": 0}, "--rounds=0 is below 1"),
    ({"size": "micro", "measure_latency": False}, "drop --no_latency"),
    (
      {
        "size": "micro",
        "tasks": ["caption"],
        "image_size": 32,
        "lengths": [400],
      },
      "--lengths=400 exceeds the 129 tokens",
    ),
    (
      {"nar": "a", "ar": "b", "topology": "v5e:2x2"},
      "--topology=v5e:2x2 is for random weights; add --size=base",
    ),
    ({"nar": "a", "ar": "b", "image_size": 32}, "--image_size=32 is for"),
    ({"nar": "a", "ar": "b", "to": __file__}, "is a file; give a folder"),
    ({"size": "micro", "ways": "ar"}, r'ways="ar" is one text; give a list'),
    ({"size": "micro", "answers": "a"}, "--answers=a is for --nar and --ar"),
  ],
)
def test_mistakes(arguments, message):
  with pytest.raises(UserError, match=message):
    compare(**arguments)


def test_lists_of_answers(pair, tmp_path):
  answers = tmp_path / "answers.txt"
  arguments = {
    "beam_size": 2,
    "wanted": ["nar-candidates"],
    "uncached": False,
  }
  opened = open_runs(**pair, checkpoint="last", answers=str(answers))
  # A list that cannot be read is no reason to go without.
  with pytest.raises(UserError, match="cannot read the list of answers"):
    make_case(opened, "vqa", "test", **arguments)
  answers.write_text("red\nblue\n")
  case = make_case(opened, "vqa", "test", **arguments)
  assert "NAR candidates" in case.programs
  case = make_case(
    open_runs(**pair, checkpoint="last"), "vqa", "test", **arguments
  )
  assert "NAR candidates" not in case.programs
  # The question is read by the decoder, too: 64 positions, 40 of them.
  assert choose_lengths(case, None) == [1, 2, 4, 8, 16, 20]
  assert choose_lengths(case, [9, 3, 9]) == [3, 9]
  assert choose_lengths(case, []) == []
  with pytest.raises(UserError, match=r"--lengths=25 .*nearest: --lengths=24"):
    choose_lengths(case, [25])
  longer = dataclasses.replace(case, facts={**case.facts, "text_length": 50})
  assert choose_lengths(longer, None) == [1, 2, 4, 8]


def test_the_best_checkpoints_are_compared(pair, tmp_path, monkeypatch):
  """As evaluate, predict and distill do, also where a later one is there."""
  folder = shutil.copytree(pair["ar"], tmp_path / "ar")
  _, variables, best = load_run(folder)
  with Checkpoints(folder, keep_last=2) as checkpoints:
    checkpoints.save_variables(best + 1, variables)
  opened = []

  def spy(*args):
    opened.append(open_runs(*args))
    raise UserError("enough")

  monkeypatch.setattr(comparison.runs, "open_runs", spy)
  for arguments in ({}, {"checkpoint": "last"}):
    with pytest.raises(UserError, match="enough"):
      compare(pair["nar"], str(folder), **arguments)
  assert [found["AR"].step for found in opened] == [best, best + 1]


def test_runs_in_the_wrong_place(pair):
  with pytest.raises(UserError, match="swap them: --nar="):
    compare(pair["ar"], pair["nar"])
  with pytest.raises(UserError, match=r"--nar=.* is an autoregressive run"):
    compare(pair["ar"], pair["ar"])
  with pytest.raises(UserError, match=r"--ar=.* is a run of the parallel"):
    compare(pair["nar"], pair["nar"])
