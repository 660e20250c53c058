"""Texts of the shapes source against a second reading of the scene.

The checks parse the words and work out the truth from the attributes and
boxes of the objects; they share no code with the source.
"""

import collections
import functools
import itertools
import re

import pytest

from narvl_jax.data.sources.shapes import ShapesSource, vqa

LEVELS = ("easy", "full")
SPLITS = ("train", "held_out")
PLURALS = {
  "circles": "circle",
  "squares": "square",
  "triangles": "triangle",
  "stars": "star",
  "crosses": "cross",
  "diamonds": "diamond",
}
SIDE = r"(left of|right of|above|below)"


@functools.cache
def all_drafts(task, level, split):
  return ShapesSource(task=task, split=split, difficulty=level), []


def drafts(task, level, split, count):
  """The first drafts; those made for one test serve the others."""
  source, made = all_drafts(task, level, split)
  made.extend(source.draft(i) for i in range(len(made), count))
  return made[:count]


def matching(phrase: str, objects):
  """The objects that "small red circle" or "blue objects" can mean."""
  wanted = {PLURALS.get(word, word) for word in phrase.split()}
  wanted -= {"object", "objects"}
  return [o for o in objects if wanted <= {o.size, o.texture, o.color, o.shape}]


def the(phrase: str, objects):
  (found,) = matching(phrase, objects)
  return found


def middle(item):
  x0, y0, x1, y1 = item.box
  return (x0 + x1) / 2, (y0 + y1) / 2


def lies(item, side: str, anchor) -> bool:
  (x, y), (u, v) = middle(item), middle(anchor)
  return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[
    side
  ]


def answer_to(question: str, objects) -> str:
  """The answer to a question, worked out from the objects."""

  def read(pattern):
    return re.fullmatch(pattern, question)

  def yes(truth):
    return "yes" if truth else "no"

  if m := read(r"how many (.+) are there\?"):
    return str(len(matching(m[1], objects)))
  if m := read(r"what (color|shape|size|texture) is the (.+)\?"):
    return getattr(the(m[2], objects), m[1])
  if m := read(r"is there a (.+)\?"):
    return yes(matching(m[1], objects))
  if m := read(r"are there more (.+) than (.+)\?"):
    a, b = (len(matching(m[i], objects)) for i in (1, 2))
    return yes(a > b)
  if m := read(r"is the (.+) (larger|smaller) than the (.+)\?"):
    a, b = the(m[1], objects).side, the(m[3], objects).side
    assert abs(a - b) >= 5
    return yes(a > b if m[2] == "larger" else a < b)
  if m := read(rf"is the (.+) {SIDE} the (.+)\?"):
    return yes(lies(the(m[1], objects), m[2], the(m[3], objects)))
  m = read(rf"what (shape )?is {SIDE} the (.+)\?")
  assert m, question
  anchor = the(m[3], objects)
  (found,) = [o for o in objects if o is not anchor and lies(o, m[2], anchor)]
  return found.shape if m[1] else f"{found.color} {found.shape}"


def label_of(hypothesis: str, objects, screen) -> str:
  """The label of a hypothesis by the visible objects."""

  def label(truth):
    return "yes" if truth else "no"

  unseen = "no" if screen is None else "maybe"
  if m := re.fullmatch(r"there is a (.+)", hypothesis):
    return "yes" if matching(m[1], objects) else unseen
  if m := re.fullmatch(r"there are (\d) (.+)", hypothesis):
    seen = len(matching(m[2], objects))
    if screen is None or seen > int(m[1]):
      return label(seen == int(m[1]))
    return "maybe"
  if m := re.fullmatch(rf"the (.+) is {SIDE} the (.+)", hypothesis):
    known = [matching(m[i], objects) for i in (1, 3)]
    if all(known):
      return label(lies(the(m[1], objects), m[2], the(m[3], objects)))
    # What is not seen can only be behind the screen.
    assert screen is not None
    first, second = (found[0] if found else screen for found in known)
    return "maybe" if lies(first, m[2], second) else "no"
  m = re.fullmatch(r"the (.+) is (\w+)", hypothesis)
  assert m, hypothesis
  seen = matching(m[1], objects)
  if not seen:
    assert screen is not None
    return "maybe"
  assert len(seen) == 1
  return label(matching(m[2], seen))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_answers_are_true(level, split):
  kinds = collections.Counter()
  for found in drafts("vqa", level, split, 2000):
    assert found.answer == answer_to(found.prompt, found.scene.objects)
    kinds[found.kind] += 1
  assert set(kinds) == set(vqa.KINDS)
  assert min(kinds.values()) > 2000 / 5 * 0.8


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_hypotheses_have_the_right_label(level, split):
  kinds = set()
  for found in drafts("entailment", level, split, 2000):
    scene = found.scene
    truth = label_of(found.prompt, scene.objects, scene.screen)
    assert found.answer == truth, found.prompt
    kinds.add(found.kind)
  textures = {"texture"} if level == "full" else set()
  assert kinds == {"existence", "color", "size", "count", "relation"} | textures


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_captions_read_from_left_to_right(level, split):
  lengths = set()
  for found in drafts("caption", level, split, 500):
    objects = sorted(found.scene.objects, key=lambda o: middle(o)[0])
    said = found.answer.split(" and ")
    assert found.kind.split()[0] == str(len(said)) == str(len(objects))
    for item, text in zip(objects, said, strict=True):
      parts = ["a", item.size, item.texture, item.color, item.shape]
      assert text == " ".join(part for part in parts if part != "solid")
    lengths.add(len(said))
  assert lengths == set(range(1, 6 if level == "full" else 4))


def parts_of(phrase: str) -> list[str]:
  """Shorter descriptions by some of the words, "object" for the shape."""
  said = phrase.split()
  named = [word for word in said if word != "object"]
  parts = []
  for count in range(1, len(named)):
    for some in itertools.combinations(named, count):
      noun = [] if some[-1] in PLURALS.values() else ["object"]
      if count + len(noun) < len(said):
        parts.append(" ".join([*some, *noun]))
  return parts


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("level", LEVELS)
def test_expressions_mean_one_object_and_are_minimal(level, split):
  relations = 0
  for found in drafts("grounding", level, split, 2000):
    objects = found.scene.objects
    if m := re.fullmatch(rf"(.+) {SIDE} (.+)", found.prompt):
      relations += 1
      assert found.kind == "relation"
      assert len(matching(m[1], objects)) == 2
      anchor = the(m[3], objects)
      (target,) = [o for o in matching(m[1], objects) if lies(o, m[2], anchor)]
    else:
      assert found.kind == "attribute"
      target = the(found.prompt, objects)
      # "large red star" is no longer than "large red object".
      for shorter in parts_of(found.prompt):
        assert len(matching(shorter, objects)) > 1, (found.prompt, shorter)
    assert found.box == target.box
  share = 0.3 if level == "full" else 0.15
  assert abs(relations / 2000 - share) < 0.05


@pytest.mark.parametrize("level", LEVELS)
def test_labels_are_balanced(level):
  answers = collections.defaultdict(collections.Counter)
  for found in drafts("entailment", level, "train", 4000):
    answers[found.kind][found.answer] += 1
  for counts in answers.values():
    assert set(counts) == {"yes", "no", "maybe"}
    for count in counts.values():
      assert abs(count / sum(counts.values()) - 1 / 3) < 0.06
  answers.clear()
  for found in drafts("vqa", level, "train", 4000):
    form = found.prompt if found.kind == "count" else found.prompt.split()[0]
    form = "how many" if form.startswith("how") else form
    answers[found.kind, form][found.answer] += 1
  for (kind, form), counts in answers.items():
    if form in ("is", "are"):
      assert set(counts) == {"yes", "no"}
      assert abs(counts["yes"] / sum(counts.values()) - 0.5) < 0.07
    if kind == "count":
      largest = 5 if level == "full" else 3
      assert set(counts) == {str(i) for i in range(largest + 1)}
      assert max(counts.values()) < 1.5 * sum(counts.values()) / len(counts)


def blind_accuracy(task, level):
  """Accuracy of the most frequent answer to each text, on unseen texts."""
  found = drafts(task, level, "train", 18000)
  known = collections.defaultdict(collections.Counter)
  for item in found[:15000]:
    for key in (item.prompt, item.kind):
      known[key][item.answer] += 1
  right, total = collections.Counter(), collections.Counter()
  for item in found[15000:]:
    counts = known.get(item.prompt) or known[item.kind]
    for kind in (item.kind, "all"):
      total[kind] += 1
      right[kind] += counts.most_common(1)[0][0] == item.answer
  return {kind: right[kind] / total[kind] for kind in total}


# The columns of the table in `shapes/vqa.py`, with room for fewer questions.
@pytest.mark.parametrize(
  ("level", "limits"),
  [
    ("easy", (0.42, 0.32, 0.34, 0.55, 0.56, 0.47)),
    ("full", (0.40, 0.22, 0.36, 0.57, 0.57, 0.34)),
  ],
)
def test_words_alone_do_not_answer_questions(level, limits):
  accuracy = blind_accuracy("vqa", level)
  limits = dict(zip(("all", *vqa.KINDS), limits, strict=True))
  assert accuracy.keys() == limits.keys()
  for kind, limit in limits.items():
    assert accuracy[kind] < limit, (kind, accuracy)


def test_words_alone_do_not_label_hypotheses():
  for kind, value in blind_accuracy("entailment", "easy").items():
    assert value < 0.43, (kind, value)


@pytest.mark.parametrize("split", SPLITS)
def test_absent_combinations_are_near_misses(split):
  near = total = 0
  for found in drafts("vqa", "easy", split, 2000):
    m = re.fullmatch(r"is there a (\w+) (\w+)\?", found.prompt)
    objects = found.scene.objects
    if m and m[2] != "object" and found.answer == "no":
      colors = {o.color for o in objects}
      shapes = {o.shape for o in objects}
      if len(objects) > 1:
        assert m[1] in colors or m[2] in shapes
      if len(objects) > 2:
        total += 1
        near += m[1] in colors and m[2] in shapes
  assert total > 30
  assert near > 0.7 * total
