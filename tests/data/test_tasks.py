"""Tasks: prompts, targets, settings, answers, mistakes."""

import math
import pickle
from typing import Any

import numpy as np
import pytest

from narvl_jax.data import tasks
from narvl_jax.data.example import TASKS, Record
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from tests.data.task_records import RECORDS, SIZE, make_vocabulary
from tests.data.task_records import changed as _change


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
  return make_vocabulary()


@pytest.mark.parametrize(
  ("name", "source", "target"),
  [
    ("caption", " what does the image describe?", " A red RED dog"),
    ("vqa", " what color is it? object: dog cat", " red"),
    (
      "grounding",
      ' which region does the text " the dog " describe?',
      "<bin_0><bin_2><bin_5><bin_10>",
    ),
    (
      "entailment",
      ' can image and text1 " a cat " imply text2 " a dog "?',
      " maybe",
    ),
  ],
)
def test_encode(
  vocabulary: Vocabulary, name: str, source: str, target: str
) -> None:
  task = tasks.make_task(name, vocabulary)
  encoded = task.encode(RECORDS[name])
  assert encoded.text_ids[0] == vocabulary.bos_id
  assert encoded.text_ids[-1] == vocabulary.eos_id
  assert vocabulary.decode(encoded.text_ids) == source
  assert encoded.label_ids[-1] == vocabulary.eos_id
  assert vocabulary.decode(encoded.label_ids) == target
  assert vocabulary.unk_id not in encoded.text_ids + encoded.label_ids
  assert encoded.confidence == 1.0
  # The first time fills caches, the second reads them.
  assert task.encode(RECORDS[name]) == encoded
  without = tasks.make_task(name, vocabulary, {"eos": False})
  assert without.encode(RECORDS[name]).label_ids == encoded.label_ids[:-1]
  untold = task.encode(RECORDS[name], with_target=False)
  assert untold == (encoded.text_ids, [], 1.0)


def test_encoded_ids_are_the_callers_own(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("vqa", vocabulary)
  first = task.encode(RECORDS["vqa"])
  first.text_ids.clear()
  assert len(task.encode(RECORDS["vqa"]).text_ids) > 5


def test_defaults() -> None:
  merging = {
    name: tasks.default_settings(name)["merge_repeats"] for name in TASKS
  }
  assert merging == {
    "caption": True,
    "vqa": True,
    "grounding": False,
    "entailment": False,
  }
  assert all(tasks.default_settings(name)["eos"] for name in TASKS)
  assert tasks.default_settings("vqa")["max_source_words"] == 80
  assert tasks.default_settings("vqa")["max_objects"] == 30
  assert tasks.default_settings("grounding")["max_source_words"] == 128
  assert tasks.default_settings("caption")["max_target_words"] == 20


def test_merge_repeats_is_a_setting(vocabulary: Vocabulary) -> None:
  assert tasks.make_task("vqa", vocabulary).merge_repeats
  task = tasks.make_task("vqa", vocabulary, {"merge_repeats": False})
  assert not task.merge_repeats


def _source(vocabulary: Vocabulary, record: Record, **settings: Any) -> str:
  task = tasks.make_task(record.task, vocabulary, settings)
  return vocabulary.decode(task.encode(record).text_ids)


def _target(vocabulary: Vocabulary, record: Record, **settings: Any) -> str:
  task = tasks.make_task(record.task, vocabulary, settings)
  return vocabulary.decode(task.encode(record).label_ids)


def test_vqa_settings(vocabulary: Vocabulary) -> None:
  record = RECORDS["vqa"]
  assert _source(vocabulary, record, add_object=False) == " what color is it?"
  assert _source(vocabulary, record, max_objects=1).endswith(" object: dog")
  assert _source(vocabulary, record, max_source_words=2) == (
    " what color? object: dog cat"
  )
  none = _change("vqa", objects=None, prompt="is it red?")
  assert _source(vocabulary, none) == " is it red?"
  empty = _change("vqa", objects=())
  assert _source(vocabulary, empty) == " what color is it? object: "
  text = _source(vocabulary, none, prompt="the text {} a", object_prompt="{}")
  assert text == " the text is it red? a"
  long = _change("vqa", answers={"red red dog": 1.0})
  assert _target(vocabulary, long, max_target_words=2) == " red red"
  assert _target(vocabulary, long) == " red red dog"


def test_a_task_can_be_pickled(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("vqa", vocabulary)
  encoded = task.encode(RECORDS["vqa"])
  copy = pickle.loads(pickle.dumps(task))
  assert copy.encode(RECORDS["vqa"]) == encoded


def test_only_captions_know_placeholders_of_people(
  vocabulary: Vocabulary,
) -> None:
  def source(name: str) -> str:
    record = _change(name, prompt="<person> left")
    return tasks.make_task(name, vocabulary).texts(record)[0]

  assert source("vqa") == " <person> left?"
  assert '" person left "' in source("grounding")
  assert '" person left "' in source("entailment")


def test_vqa_uses_the_best_answer(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("vqa", vocabulary)
  record = _change("vqa", answers={"it": 0.3, "dog": 0.6, "cat": 0.6})
  encoded = task.encode(record)
  assert vocabulary.decode(encoded.label_ids) == " dog"
  assert encoded.confidence == 0.6


def test_caption_settings(vocabulary: Vocabulary) -> None:
  record = RECORDS["caption"]
  assert _target(vocabulary, record, max_target_words=2) == " A red"
  assert _source(vocabulary, record, prompt="describe") == " describe"
  long = _change("caption", answers={"red " * 30: 1.0})
  assert _target(vocabulary, long) == " red" * 20
  assert _target(vocabulary, long, max_target_words=0) == " red" * 30


def test_entailment_premise(vocabulary: Vocabulary) -> None:
  plain = ' does the image describe " a dog "?'
  record = RECORDS["entailment"]
  texts = Vocabulary.train([plain + " maybe yes no"] * 2, 200)
  assert _source(texts, record, add_caption=False) == plain
  assert _source(texts, _change("entailment", premise="")) == plain
  # A premise of which cleaning leaves nothing is none.
  assert _source(texts, _change("entailment", premise=",. ")) == plain
  empty = _source(
    vocabulary, _change("entailment", premise=""), allow_empty=True
  )
  assert empty == ' can image and text1 "  " imply text2 " a dog "?'
  short = _source(vocabulary, record, premise_prompt="{} {}", prompt="{}")
  assert short == " a cat a dog"


def test_grounding_bins(vocabulary: Vocabulary) -> None:
  # 11 bins on 200 x 100 pixels: 20 and 10 pixels apart.
  box = _change("grounding", box=(29.9, 30.1, 34.9, 95.1))
  assert _target(vocabulary, box) == "<bin_1><bin_3><bin_2><bin_10>"
  # Halves go to the even neighbour: 2.5 and 7.5.
  picture = np.zeros((64, 128, 3), np.uint8)
  ties = _change("grounding", image=picture, box=(32, 16, 96, 48))
  assert _target(vocabulary, ties) == "<bin_2><bin_2><bin_8><bin_8>"


def test_grounding_outside(vocabulary: Vocabulary) -> None:
  def target(*box: float, **settings: Any) -> str:
    record = _change("grounding", box=box)
    return _target(vocabulary, record, **settings)

  # The picture is 200 x 100 pixels.
  clamped = "<bin_0><bin_1><bin_10><bin_10>"
  assert target(-1, 10, 201, 101) == clamped
  assert target(-50, 10, 250, 120, max_outside=50) == clamped
  assert target(-50, 10, 250, 120, clamp=False) == "<unk><bin_1><unk><unk>"
  for box, outside in (
    ((-1.5, 10, 20, 20), "1.5"),
    ((10, -3, 20, 20), "3"),
    ((10, 10, 204, 20), "4"),
    ((10, 10, 20, 105), "5"),
  ):
    flag = f"max_outside={math.ceil(float(outside))}$"
    with pytest.raises(
      UserError,
      match=rf"^grounding record \"g1\" has the box \(.*\), {outside} pixels"
      rf" outside its picture of 200 x 100 pixels; the limit is 1: .*{flag}",
    ):
      target(*box)
  with pytest.raises(UserError, match=r"0\.5 pixels .*the limit is 0: "):
    target(0, 0, 200.5, 100, max_outside=0)
  for box in ((-0.5, 5, 0, 9), (5, 100, 9, 101), (300, 5, 400, 9)):
    with pytest.raises(UserError, match="lies wholly outside its picture"):
      target(*box)


def test_grounding_decode(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("grounding", vocabulary)
  first = vocabulary.bin_start
  box = [first, first + 5, first + 10, first + 10]
  assert task.decode([*box, vocabulary.eos_id], SIZE) == (0, 50, 200, 100)
  assert task.decode([4, *box, first + 11], SIZE) == (0, 50, 200, 100)
  zero = (0, 0, 0, 0)
  assert task.decode(box[:3], SIZE) == zero
  assert task.decode([*box, first], SIZE) == zero
  assert task.decode([], SIZE) == zero


@pytest.mark.parametrize("record", RECORDS.values(), ids=str)
def test_decode_inverts_encode(vocabulary: Vocabulary, record: Record) -> None:
  answers = {
    "caption": "A red RED dog",
    "vqa": "red",
    "grounding": (0, 20, 100, 100),
    "entailment": "maybe",
  }
  task = tasks.make_task(record.task, vocabulary)
  ids = task.encode(record).label_ids
  assert task.decode(ids, SIZE) == answers[record.task]


def test_entailment_uses_the_first_symbol(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("entailment", vocabulary)
  yes, no = vocabulary.encode(" yes"), vocabulary.encode(" no")
  silent = [0, 1, 2, vocabulary.blank_id]
  assert task.decode([*silent, *yes, *no], SIZE) == "yes"
  assert task.decode([], SIZE) == ""


def test_entailment_with_split_answers() -> None:
  letters = Vocabulary.train([" yes no maybe"], 15, num_bins=0)
  task = tasks.make_task("entailment", letters)
  assert len(letters.encode(" maybe")) == 6
  assert task.decode(letters.encode(" maybe"), SIZE) == "maybe"


def test_vocabulary_texts_are_what_is_encoded() -> None:
  texts = {
    name: list(tasks.vocabulary_texts(name, None, [RECORDS[name]]))
    for name in TASKS
  }
  assert texts["caption"] == [
    " what does the image describe?",
    " A red RED dog",
    " cat",
  ]
  assert texts["vqa"][:2] == [" what color is it?", " object: dog cat"]
  assert texts["vqa"][2:] == [" blue", " red", " green"]
  assert len(texts["grounding"]) == 1
  assert texts["entailment"][1:] == [" yes", " no", " maybe"]
