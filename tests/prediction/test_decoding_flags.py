"""Which decoding each task gets, and what does not fit it."""

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from narvl_jax.data.example import TASKS
from narvl_jax.decoding import Decoding, ParallelReader
from narvl_jax.decoding.autoregressive_reader import AutoregressiveReader
from narvl_jax.decoding.settings import METHODS
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import resolve_model_config
from narvl_jax.models import make_model
from narvl_jax.prediction.answer_list import with_answers
from narvl_jax.prediction.decodings import (
  check_answers_used,
  decoding_name,
  decodings_for,
)
from narvl_jax.prediction.readers import answer_lengths, make_reader
from tests.evaluation import tiny_run


@pytest.fixture(scope="module")
def parallel() -> Any:
  return tiny_run.tiny_model()[0]


@pytest.fixture(scope="module")
def autoregressive(parallel: Any) -> Any:
  config = parallel.config.copy_and_resolve_references()
  config.model.decoder = "autoregressive"
  architecture = resolve_model_config(config, parallel.vocabulary)
  return dataclasses.replace(
    parallel,
    config=config,
    model_config=architecture,
    model=make_model(architecture),
  )


def test_greedy_by_default(parallel: Any) -> None:
  assert decodings_for(parallel, None) == dict.fromkeys(TASKS, Decoding())


def test_captions_are_never_constrained(parallel: Any) -> None:
  decodings = decodings_for(parallel, {"method": "beam", "constrained": True})
  constrained = {name: x.constrained for name, x in decodings.items()}
  assert constrained == {name: name != "caption" for name in TASKS}


def test_reference_settings(parallel: Any, autoregressive: Any) -> None:
  assert decodings_for(parallel, {"method": "reference"}) == dict.fromkeys(
    TASKS, Decoding()
  )
  decodings = decodings_for(
    autoregressive, {"method": "reference", "beam_size": 3}
  )
  caption = decodings["caption"]
  assert (caption.method, caption.no_repeat_ngram) == ("beam", 3)
  assert caption.beam_size == 3
  assert decodings["grounding"].min_length == 4
  assert decodings["entailment"].method == "candidates"


def test_unknown_method(parallel: Any) -> None:
  with pytest.raises(UserError, match=r'--decoding="baem" is unknown.*beam'):
    decodings_for(parallel, {"method": "baem"})


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"method": "bam"}, '"bam" is unknown'),
    ({"beam_size": 0}, "beam_size=0 must be at least 1; nearest: 1"),
    ({"beam_size": 2.5}, r"beam_size=2\.5 must be a whole number, such as 1"),
    ({"constrained": "no"}, "constrained='no' must be True or False"),
    ({"max_length": -1}, "max_length=-1 must be at least 0"),
    (
      {"method": "beam", "num_best": 6},
      "num_best=6 exceeds decoding.beam_size=5; nearest: 5",
    ),
    (
      {"min_length": 5, "max_length": 4},
      "min_length=5 exceeds decoding.max_length=4; nearest: 4",
    ),
  ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
  with pytest.raises(UserError, match=message):
    Decoding(**settings)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"beam_sise": 3},
      r'decoding has no "beam_sise"\. Did you mean "beam_size"',
    ),
    ("beam", r"decoding='beam' is not a dict; such as .*\"method\": \"beam\""),
    ({"max_length": 3}, "--max_length=3 is for autoregressive.*leave --max_le"),
    ({"beam_size": 3}, "--beam_size=3 changes nothing with --decoding=greedy"),
    (
      {"method": "greedy", "num_best": 2},
      "--num_best=2 changes nothing.*add --decoding=beam",
    ),
    (
      {"method": "reference", "beam_size": 3},
      "--beam_size=3 changes nothing with --decoding=reference",
    ),
  ],
)
def test_settings_without_effect(
  parallel: Any, settings: Any, message: str
) -> None:
  with pytest.raises(UserError, match=message):
    decodings_for(parallel, settings)


def test_settings_that_affect_some_task(
  parallel: Any, autoregressive: Any
) -> None:
  for method in ("beam", "candidates"):
    assert decodings_for(parallel, {"method": method, "num_best": 2})
  assert decodings_for(autoregressive, {"max_length": 3})
  # Captions and boxes are searched for, the others are not.
  assert decodings_for(autoregressive, {"method": "reference", "beam_size": 3})


def test_answers_without_effect() -> None:
  with pytest.raises(UserError, match=r'="a.txt" is for vqa; the task is capt'):
    check_answers_used({"caption": Decoding(constrained=True)}, "a.txt")
  with pytest.raises(UserError, match=r"nothing with --decoding=beam alone; "):
    check_answers_used({"vqa": Decoding("beam")}, "a.txt")
  for used in (Decoding(constrained=True), Decoding("candidates")):
    check_answers_used({"caption": Decoding(), "vqa": used}, "a.txt")
  check_answers_used({"vqa": Decoding()}, "")


@pytest.mark.parametrize("command", ["evaluate", "distill"])
def test_help_of_a_command_names_the_flags(command: str) -> None:
  result = subprocess.run(
    [sys.executable, "-m", f"narvl_jax.{command}", "--help"],
    capture_output=True,
    text=True,
    check=False,
  )
  for flag in ("decoding=", "[no]constrained", "beam_size=", "num_best="):
    assert f"\n  --{flag}" in result.stdout
  assert "|".join((*METHODS, "reference")) in result.stdout
  assert ("\n  --num_processes=" in result.stdout) == (command == "distill")


def test_beam_larger_than_the_vocabulary(
  parallel: Any, autoregressive: Any
) -> None:
  for experiment in (parallel, autoregressive):
    most = experiment.model_config.vocab_size - 1
    with pytest.raises(UserError, match=f"nearest: --beam_size={most}"):
      make_reader(experiment, "caption", Decoding("beam", beam_size=most + 1))


def test_free_texts_have_no_candidates(autoregressive: Any) -> None:
  with pytest.raises(UserError, match="caption has no set of answers"):
    make_reader(autoregressive, "caption", Decoding("candidates"))


def test_questions_need_a_list(parallel: Any, tmp_path: Any) -> None:
  constrained = Decoding(constrained=True)
  with pytest.raises(UserError, match=r"tasks\.vqa\.answers"):
    make_reader(parallel, "vqa", constrained)
  path = tmp_path / "answers.txt"
  path.write_text("red\nblue\n")
  listed = with_answers(parallel, path)
  reader = make_reader(listed, "vqa", constrained)
  assert isinstance(reader, ParallelReader)
  assert reader.answers is not None
  vocabulary = parallel.vocabulary
  words = [tuple(vocabulary.encode(" " + word)) for word in ("red", "blue")]
  assert list(reader.answers.sequences) == words
  # The model was trained to emit eos.
  assert reader.answers.then == (vocabulary.eos_id,)


def test_box_of_a_token_by_token_model(autoregressive: Any) -> None:
  reader = make_reader(
    autoregressive, "grounding", Decoding("beam", constrained=True)
  )
  assert isinstance(reader, AutoregressiveReader)
  assert reader.answers is not None
  assert (reader.answers.count, reader.answers.then) == (4, ())
  assert len(reader.answers.tokens) == autoregressive.vocabulary.num_bins
  assert not reader.prompted
  question = make_reader(autoregressive, "vqa", Decoding())
  assert isinstance(question, AutoregressiveReader)
  assert question.prompted


def test_lengths_are_no_part_of_a_program(autoregressive: Any) -> None:
  short, long = (Decoding("beam", max_length=n) for n in (3, 9))
  assert make_reader(autoregressive, "caption", short) == make_reader(
    autoregressive, "caption", long
  )
  np.testing.assert_array_equal(answer_lengths(autoregressive, short), [1, 3])
  # Room for eos stays.
  most = autoregressive.label_length - 1
  np.testing.assert_array_equal(
    answer_lengths(autoregressive, Decoding(max_length=999)), [1, most]
  )


def test_a_name_for_every_way_to_decode(tmp_path):
  name = decoding_name
  assert name(None) == name({}) == name({"method": "greedy"}) == "greedy"
  # What is the default anyway is no other way.
  assert name({"constrained": False, "beam_size": 5}) == "greedy"
  assert name({"method": "beam", "num_best": 3, "normalize": False}) == (
    "beam-num_best3-no_normalize"
  )
  # Its defaults depend on the task.
  assert name({"method": "reference", "beam_size": 5}) == "reference-beam_size5"
  first, same, other = (tmp_path / f"{x}.txt" for x in "abc")
  for path, text in ((first, "yes"), (same, "yes\n"), (other, "yes\nno")):
    path.write_text(text)
  names = [name({"constrained": True}, str(x)) for x in (first, same, other)]
  assert names[0] == names[1] != names[2]
  assert names[0].startswith("greedy-constrained-answers_")
