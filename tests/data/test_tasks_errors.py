"""Tasks: settings and records that are rejected."""

from typing import Any

import pytest

from narvl_jax.data import tasks
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from tests.data.task_records import changed as _change
from tests.data.task_records import make_vocabulary


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
  return make_vocabulary()


def test_unknown_task(vocabulary: Vocabulary) -> None:
  with pytest.raises(UserError, match=r'no task "vqq"\. Did you mean "vqa"'):
    tasks.make_task("vqq", vocabulary)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_source_word": 3}, 'Did you mean "max_source_words"'),
    ({"eos": "no"}, "eos is 'no', a str; it must be a bool"),
    ({"max_source_words": True}, "must be a int such as 80"),
    ({"max_source_words": -1}, r"is -1; it must be 0 \(no limit\)"),
    ({"prompt": "question"}, "with 0 places {}; it must have 1"),
    ({"prompt": "{} {}"}, "with 2 places {}; it must have 1"),
    ({"prompt": "{"}, 'tasks.vqa.prompt is "{"'),
    ({"object_prompt": "{name}"}, 'like the default "object: {}"'),
    ({"random_crop": 1.5}, "is 1.5; it must be between 0 and 1; the nearest"),
    ({"color_jitter": -1}, "color_jitter is -1; .* the nearest is 0$"),
    ({"color_jitter": float("nan")}, "is nan; it must be between 0 and 1$"),
    ({"random_crop": "x"}, "must be a float such as 0.0"),
    ({"random_crop": True}, "must be a float such as 0.0"),
    ({"sample_answer": 1}, "must be a bool such as False"),
  ],
)
def test_bad_settings(
  vocabulary: Vocabulary, settings: dict[str, Any], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    tasks.make_task("vqa", vocabulary, settings)


def test_whole_numbers_are_floats(vocabulary: Vocabulary) -> None:
  task = tasks.make_task("vqa", vocabulary, {"random_crop": 1})
  assert type(task.settings.random_crop) is float
  message = "max_outside is -2; it must be 0 or more; the nearest is 0"
  with pytest.raises(UserError, match=message):
    tasks.make_task("grounding", vocabulary, {"max_outside": -2})


@pytest.mark.parametrize("name", ["vqa", "grounding", "entailment"])
@pytest.mark.parametrize("prompt", ["", "  \n", "!?"])
def test_empty_prompt(vocabulary: Vocabulary, name: str, prompt: str) -> None:
  record = _change(name, prompt=prompt)
  with pytest.raises(UserError, match=r"prompt of .* is empty .*--prompt"):
    tasks.make_task(name, vocabulary).encode(record, with_target=False)
  task = tasks.make_task(name, vocabulary, {"allow_empty": True})
  if prompt != "!?":
    assert len(task.encode(record, with_target=False).text_ids) > 2


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("vqa", {"answers": {}}, 'vqa record "v1" has no answer'),
    ("caption", {"answers": {}}, 'caption record "c1" has no answer'),
    (
      "entailment",
      {"answers": {"mayb": 1.0}},
      "has the answer 'mayb'. Did you mean .maybe",
    ),
    ("grounding", {"box": None}, 'grounding record "g1" has no box'),
    ("grounding", {"box": (9, 0, 5, 5)}, r"has the box \(9, 0, 5, 5\); it"),
    ("grounding", {"box": (0, 9, 5, 5)}, "x0 < x1 and y0 < y1"),
    ("grounding", {"box": (5, 0, 5, 5)}, "x0 < x1 and y0 < y1"),
    ("grounding", {"box": (0, 5, 5, 5)}, "x0 < x1 and y0 < y1"),
    ("grounding", {"box": (0, 0, float("nan"), 5)}, "has the box"),
    ("grounding", {"box": (0, 0, 5)}, "has the box"),
    ("vqa", {"answers": {"red": 1.5}}, "'red' with the score 1.5; it must be"),
    ("vqa", {"answers": {"red": 0.0}}, "above 0 and at most 1"),
    ("vqa", {"answers": {"red": float("nan")}}, "score nan; it must be above"),
  ],
)
def test_bad_targets(
  vocabulary: Vocabulary, name: str, changes: dict[str, Any], message: str
) -> None:
  with pytest.raises(UserError, match=message):
    tasks.make_task(name, vocabulary).encode(_change(name, **changes))


@pytest.mark.parametrize(
  ("name", "answer"), [("caption", "?!"), ("caption", " "), ("vqa", " ")]
)
def test_empty_target(vocabulary: Vocabulary, name: str, answer: str) -> None:
  record = _change(name, answers={answer: 1.0})
  with pytest.raises(
    UserError,
    match=rf"target of {name} record .* is empty \(given: .*allow_empty=True",
  ):
    tasks.make_task(name, vocabulary).encode(record)


def test_empty_target_is_allowed(vocabulary: Vocabulary) -> None:
  record = _change("caption", answers={"?!": 1.0})
  task = tasks.make_task("caption", vocabulary, {"allow_empty": True})
  assert task.encode(record).label_ids == [vocabulary.eos_id]
  settings = {"allow_empty": True, "eos": False}
  task = tasks.make_task("caption", vocabulary, settings)
  with pytest.raises(UserError, match=r"empty target; set .*eos=True"):
    task.encode(record)


def test_grounding_without_bins() -> None:
  few = Vocabulary.train([" a"], 100, num_bins=1)
  with pytest.raises(UserError, match=r"has 1; set .*num_bins=64"):
    tasks.make_task("grounding", few)


def test_too_few_queries() -> None:
  def encoded(*targets: list[int]) -> list[tasks.Encoded]:
    return [tasks.Encoded([0, 2], target) for target in targets]

  samples = {
    "vqa": encoded([5, 2], [5, 6, 7, 2]),
    # Equal neighbours need a blank between them.
    "grounding": encoded([9, 9, 9, 8, 2], [9, 8, 9, 9, 2], []),
  }
  tasks.check_num_queries(samples, 6)
  message = (
    'num_queries is 5, but the shortest target of "grounding" needs 6'
    r" \(the longest seen 7\); set --config.model.num_queries=7"
  )
  with pytest.raises(UserError, match=message):
    tasks.check_num_queries(samples, 5)
  with pytest.raises(UserError, match='shortest target of "vqa" needs 2'):
    tasks.check_num_queries(samples, 1)
