"""Tasks against rows that the official code produced."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from narvl_jax.data import tasks
from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.batches.batching import Batcher
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import base, entailment
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.evaluation.grounding import BoxOverlap
from narvl_jax.evaluation.vqa import VqaAccuracy
from narvl_jax.query_ctc import collapse

SIZE = (200, 100)


@pytest.fixture(scope="module")
def official(shared_files: pathlib.Path) -> Vocabulary:
  folder = shared_files / "bpe"
  names = ("dict.txt", "encoder.json", "vocab.bpe")
  return Vocabulary.from_files("official", [folder / name for name in names])


@pytest.fixture(scope="module")
def reference(shared_files: pathlib.Path) -> dict[str, Any]:
  path = shared_files / "fixtures" / "text_pipeline.json"
  return json.loads(path.read_text())


def _record(task: str, **fields: Any) -> Record:
  return Record("1", task, fields.pop("image", b""), **fields)


def test_cleaning_as_reference(reference: dict[str, Any]) -> None:
  for text, limit, cleaned in reference["pre_question"]:
    assert base.clean_question(text, limit or 0) == cleaned
  for text, limit, cleaned in reference["pre_caption"]:
    assert base.clean_caption(text, limit or 0) == cleaned


def test_grounding_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  task = tasks.make_task("grounding", official, {"allow_empty": True})
  for row in reference["refcoco"]:
    width, height = row["image_size"]
    record = _record(
      "grounding",
      image=np.zeros((height, width, 3), np.uint8),
      prompt=row["text"],
      box=tuple(row["box"]),
    )
    encoded = task.encode(record)
    assert encoded == (row["source"], row["target"], 1.0)
    names = [official.symbol(i) for i in encoded.label_ids[:-1]]
    assert " ".join(names) == row["target_string"]


def test_batch_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  expected = reference["refcoco_collated"]
  task = tasks.make_task("grounding", official)
  texts = (reference["refcoco"][0]["text"], "<person> holding a frisbee")
  rows, length = np.shape(expected["src_tokens"])
  batcher = Batcher((512, 512), length, np.shape(expected["target"])[1])
  batch = batcher.empty(rows)
  boxes = (reference["refcoco"][0]["box"], (0, 0, 640, 480))
  for i, (text, box) in enumerate(zip(texts, boxes, strict=True)):
    record = _record(
      "grounding",
      image=np.zeros((480, 640, 3), np.uint8),
      prompt=text,
      box=tuple(box),
    )
    batcher.write(batch, i, record, task)
  assert batch["text"].tolist() == expected["src_tokens"]
  assert batch["labels"].tolist() == expected["target"]
  assert batch["image_mask"].tolist() == expected["patch_masks"]
  assert batch["label_length"].tolist() == expected["tgt_lengths"]


def test_vqa_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  task = tasks.make_task("vqa", official)
  for row in reference["vqa"]:
    question, answers, objects = row["row"]
    pairs = [item.split("|!+") for item in answers.split("&&")]
    record = _record(
      "vqa",
      prompt=question,
      answers={answer: float(score) for score, answer in pairs},
      objects=tuple(objects.split("&&")),
    )
    encoded = task.encode(record)
    # A prompt before the answer, which only the other decoder has, is padding.
    answer_ids = [i for i in row["target"] if i != official.pad_id]
    assert encoded[:2] == (row["source"], answer_ids)
    assert encoded.confidence == pytest.approx(row["conf"][0])


def test_caption_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  task = tasks.make_task("caption", official)
  for row in reference["caption"]:
    record = _record("caption", answers={row["caption"]: 1.0})
    encoded = task.encode(record)
    assert encoded.text_ids == row["source"]
    if row["split"] == "train":
      assert encoded.label_ids == row["target"]
    else:
      cleaned = base.delete_punctuation(normalize_answer(row["caption"]))
      assert " " + cleaned == row["target_text"]
      ids = official.encode(" " + cleaned)
      assert [*ids, official.eos_id] == row["target"]


def test_entailment_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  for row in reference["snli_ve"]:
    settings = {"add_caption": row["add_caption"]}
    task = tasks.make_task("entailment", official, settings)
    hypothesis, premise, label = row["row"]
    record = _record(
      "entailment",
      prompt=hypothesis,
      premise=premise,
      answers={entailment.ANSWER_OF_LABEL[label]: 1.0},
    )
    assert task.encode(record)[:2] == (row["source"], row["target"])
    assert task.texts(record)[0] == row["source_text"]


def _collapsed(
  vocabulary: Vocabulary, ids: list[int], merge: bool
) -> list[int]:
  packed, length = collapse(
    jnp.asarray([ids], jnp.int32),
    blank_id=vocabulary.blank_id,
    pad_id=vocabulary.pad_id,
    merge_repeats=merge,
  )
  return np.asarray(packed)[0, : int(length[0])].tolist()


def test_collapse_and_text_as_reference(
  official: Vocabulary,
  reference: dict[str, Any],
  shared_files: pathlib.Path,
) -> None:
  encoder = json.loads((shared_files / "bpe" / "encoder.json").read_text())
  dropped = (official.blank_id, official.pad_id)
  silent = (official.bos_id, official.eos_id)
  for row in reference["collapse"]:
    ids = _collapsed(official, row["in"], merge=True)
    assert ids == [i for i in row["out"] if i not in dropped]
    names = [official.symbol(i) for i in ids if i not in silent]
    shown = [str(encoder.get(name, name)) for name in names]
    assert " ".join(shown) == row["string"]
    assert official.decode(ids) == "".join(names).replace("Ġ", " ")


def test_answers_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  for name, key, answers in (
    ("vqa", "eval_vqa", "answers"),
    ("entailment", "eval_snli_ve", "answers"),
    ("caption", "eval_caption", "captions"),
  ):
    task = tasks.make_task(name, official)
    rows = reference[key]
    for ids, answer in zip(rows["hyps"], rows[answers], strict=True):
      assert task.decode(ids, SIZE) == answer


def test_boxes_as_reference(
  official: Vocabulary, reference: dict[str, Any]
) -> None:
  rows = reference["eval_refcoco"]
  size = (round(512 / rows["w_ratio"]), round(512 / rows["h_ratio"]))
  names = {official.symbol(i): i for i in range(official.size)}
  task = tasks.make_task("grounding", official)
  for symbols, box in zip(
    rows["hyps_as_bins_or_tokens"], rows["boxes"], strict=True
  ):
    ids = [names.get(symbol, 10) for symbol in symbols]
    assert task.decode(ids, size) == pytest.approx(box, rel=1e-6)


def test_scores_as_reference(reference: dict[str, Any]) -> None:
  rows = reference["eval_refcoco"]
  truth = _record("grounding", box=tuple(rows["gt"]))
  for box, accuracy in zip(rows["boxes"], rows["acc"], strict=True):
    scored = BoxOverlap().measure(truth, tuple(box))
    assert scored is not None
    assert scored["acc@0.5"] == accuracy
  # The answers that the rows were scored against.
  answers = {"yes": 1.0, "stop sign": 0.6, "2": 0.3, "playing frisbee": 1.0}
  rows = reference["eval_vqa"]
  record = _record("vqa", answers=answers)
  for answer, score in zip(rows["answers"], rows["scores"], strict=True):
    assert VqaAccuracy().measure(record, answer) == {"accuracy": score}
