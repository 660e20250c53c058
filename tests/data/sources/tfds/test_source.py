import concurrent.futures
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
from typing import Any

import pytest

from narvl_jax.data.example import Record
from narvl_jax.data.pictures import images
from narvl_jax.data.sources import load_source, locate, open_source
from narvl_jax.data.sources.tfds.source import TfdsSource
from narvl_jax.errors import UserError
from tests.data.sources import tfds_sets

COCO, REFCOCO = "coco_captions/2014", "ref_coco/refcoco_unc"
VQA = {"image": "photo", "prompt": "question", "target": "answers"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("tfds")
  tfds_sets.build(folder)
  return folder


@pytest.fixture
def opened(prepared: pathlib.Path, tmp_path: pathlib.Path) -> Any:
  """Opens a source of the prepared data sets."""

  def open_(name: str, task: str, split: str = "train", **options: Any) -> Any:
    options = {
      "data_dir": str(prepared), "index_dir": str(tmp_path), **options,
    }  # fmt: skip
    return load_source("tfds", task=task, split=split, name=name, **options)

  return open_


def by_id(source: Any) -> dict[str, Record]:
  records = {record.id: record for record in source}
  assert len(records) == len(source)
  return records


def test_coco_trains_on_one_caption_a_record(opened: Any) -> None:
  source = opened(COCO, "caption")
  found = {
    key: (tuple(r.answers.items()), r.image) for key, r in by_id(source).items()
  }
  expected = {
    str(key): (((caption, 1.0),), tfds_sets.jpeg(number))
    for number in range(tfds_sets.COCO_SPLITS["train"])
    for key, caption in tfds_sets.coco_captions(number)
  }
  assert len(expected) == 12
  assert found == expected
  assert {record.task for record in source} == {"caption"}


def test_coco_evaluates_on_all_references(opened: Any) -> None:
  found = {
    key: list(r.answers)
    for key, r in by_id(opened(COCO, "caption", "val")).items()
  }
  assert found == {
    str(n): [text for _, text in tfds_sets.coco_captions(n)]
    for n in range(10, 14)
  }


def test_coco_captions_each_may_be_chosen(opened: Any) -> None:
  assert len(opened(COCO, "caption", each="")) == 6
  captions = sum(len(tfds_sets.coco_captions(n)) for n in range(10, 14))
  assert len(opened(COCO, "caption", "val", each="captions")) == captions
  assert len(opened(COCO, "caption", "train+restval")) == 12 + 3 + 1


def test_parts_of_a_split(opened: Any) -> None:
  first = opened(COCO, "caption", "train[:50%]", each="")
  second = opened(COCO, "caption", "train[50%:]", each="")
  assert len(first) == len(second) == 3
  whole = opened(COCO, "caption", each="")
  assert [r.id for r in [*first, *second]] == [r.id for r in whole]
  parts = [opened(COCO, "caption", f"train[{k}:{k + 1}]") for k in range(6)]
  assert [r.id for part in parts for r in part] == [
    r.id for r in opened(COCO, "caption")
  ]


def test_ref_coco_has_a_record_an_expression(opened: Any) -> None:
  source = opened(REFCOCO, "grounding")
  records = by_id(source)
  expected = {
    str(key): (phrase, box, tfds_sets.jpeg(number))
    for number in range(7)
    for key, phrase, box in tfds_sets.expressions(number)
  }
  assert set(records) == set(expected)
  assert len(expected) == 9
  for key, (phrase, box, image) in expected.items():
    assert records[key].prompt == phrase
    assert records[key].box == pytest.approx(box, abs=1e-4)
    assert records[key].image == image
    assert records[key].answers == {}


def test_mapping_of_answers(opened: Any) -> None:
  fields = {
    **VQA,
    "id": "meta/name",
    "kind": "meta/kind",
    "objects": "things",
    "premise": "caption",
  }
  records = by_id(opened("my_data", "vqa", fields=fields))
  assert set(records) == {"name0", "name1", "name2"}
  record = records["name1"]
  assert record.prompt == "what is 1?"
  assert record.answers == {"cat": 1.0, "dog": 1.0}
  assert record.objects == ("tree", "car", "tree")
  assert (record.kind, record.premise) == ("animals", "a premise")


@pytest.mark.parametrize(
  ("options", "answers"),
  [
    ({"soft_scores": True}, {"cat": 0.6, "dog": 0.3}),
    (
      {"fields": {**VQA, "score": "confidences"}},
      {"cat": 1.0, "dog": 0.25},
    ),
    ({"fields": {**VQA, "score": "weights"}}, {"cat": 0.5, "dog": 0.25}),
    ({"fields": {**VQA, "target": "best"}}, {"dog": 1.0}),
    ({"labels": {"cat": "kitten"}}, {"kitten": 1.0, "dog": 1.0}),
  ],
)
def test_scores_and_class_labels(
  opened: Any, options: dict[str, Any], answers: dict[str, float]
) -> None:
  source = opened("my_data", "vqa", **{"fields": VQA, **options})
  assert source[0].answers == pytest.approx(answers)


def test_records_of_a_list(opened: Any) -> None:
  source = opened(
    "my_data", "vqa", fields={**VQA, "id": "meta/name"}, each="answers"
  )
  answers = {key: list(r.answers) for key, r in by_id(source).items()}
  assert answers == {
    f"name{n}-{k}": [answer]
    for n in range(3)
    for k, answer in enumerate(("cat", "cat", "dog"))
  }


def test_records_of_an_outer_sequence(opened: Any) -> None:
  fields = {"image": "image", "id": "image/id", "target": "objects/refexp/raw"}
  source = opened(REFCOCO, "caption", fields=fields, each="objects")
  found = {key: list(r.answers) for key, r in by_id(source).items()}
  expected: dict[str, list[str]] = {}
  for number in range(7):
    for _, phrase, _ in tfds_sets.expressions(number):
      expected.setdefault(f"{number}-{phrase.split()[1]}", []).append(phrase)
  assert found == expected
  assert {len(phrases) for phrases in found.values()} == {1, 2}


@pytest.mark.parametrize(
  "options",
  [
    {"target": "verdict"},
    {"target": "code", "labels": {"0": "yes", "1": "maybe", "2": "no"}},
  ],
)
def test_entailment_labels(opened: Any, options: dict[str, Any]) -> None:
  target, *_ = options.values()
  fields = {"image": "photo", "prompt": "question", "target": target}
  source = opened(
    "my_data",
    "entailment",
    fields={**fields, "id": "code"},
    labels=options.get("labels"),
  )
  found = {r.id: dict(r.answers) for r in source}
  assert found == {"0": {"yes": 1.0}, "1": {"maybe": 1.0}, "2": {"no": 1.0}}


@pytest.mark.parametrize(
  ("feature", "box_format", "box"),
  [
    ("place", "", (4, 10, 40, 22)),
    ("xywh", "XYWH", (4, 10, 40, 22)),
    ("xywh", "XYXY", (4, 10, 36, 12)),
    ("place", "REL_XYXY", (10 * 64 / 48, 4 * 48 / 64, 22 * 64 / 48, 30)),
  ],
)
def test_box_formats(
  opened: Any, feature: str, box_format: str, box: tuple[float, ...]
) -> None:
  fields = {"image": "photo", "prompt": "question", "box": feature}
  source = opened("my_data", "grounding", fields=fields, box_format=box_format)
  assert source[1].box == pytest.approx(box, abs=1e-4)
  assert source[1].id == "train-1"


def test_place_of_a_record(opened: Any) -> None:
  source = opened(COCO, "caption", "val", each="captions")
  places = [locate(source, i) for i in range(len(source))]
  assert len(set(places)) == len(source)
  assert places[0] == "coco_captions/2014/1.1.0 val example 0, captions 0"
  with pytest.raises(IndexError, match="no record 8 of 8"):
    source[8]
  assert source[-1] == source[7]
  assert source[1:3] == [source[1], source[2]]


def test_spec_of_a_command_line(
  prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  source = open_source(
    f"tfds:{COCO}", task="caption", split="val", data_dir=str(prepared)
  )
  assert len(source) == 4
  folder = prepared / "coco_captions" / "2014" / "1.1.0"
  again = open_source(f"tfds:{folder}", task="caption", split="val")
  assert [r.id for r in again] == [r.id for r in source]


def test_index_of_records_is_kept(
  opened: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  ids = [r.id for r in opened(REFCOCO, "grounding")]
  counted: list[int] = []
  count = TfdsSource._records_of

  def spy(self: Any, number: int) -> int:
    counted.append(number)
    return count(self, number)

  monkeypatch.setattr(TfdsSource, "_records_of", spy)
  assert [r.id for r in opened(REFCOCO, "grounding")] == ids
  assert counted == []
  # Another split has another index.
  opened(REFCOCO, "grounding", "testA")
  assert sorted(counted) == [0, 1, 2]
  # A damaged one is made again.
  for path in tmp_path.glob("*.npy"):
    data = bytearray(path.read_bytes())
    data[-12] ^= 1
    path.write_bytes(data)
  counted.clear()
  assert [r.id for r in opened(REFCOCO, "grounding")] == ids
  assert sorted(counted) == list(range(7))


def test_index_folder_may_be_unusable(
  opened: Any, tmp_path: pathlib.Path
) -> None:
  (tmp_path / "file").write_text("")
  source = opened(REFCOCO, "grounding", index_dir=str(tmp_path / "file"))
  assert len(source) == 9


def test_threads_read_the_same(opened: Any) -> None:
  source = opened(REFCOCO, "grounding")
  expected = list(source)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, range(9))) == expected


def test_another_process_without_tensorflow(
  opened: Any, tmp_path: pathlib.Path
) -> None:
  source = opened(REFCOCO, "grounding")
  assert source[3] == source[3]  # Files are open when it is pickled.
  data = pickle.dumps(source)
  assert len(data) < 1000
  path = tmp_path / "source.pickle"
  path.write_bytes(data)
  program = (
    "import pickle, sys\n"
    f"source = pickle.load(open({str(path)!r}, 'rb'))\n"
    "print([r.id for r in source])\n"
    "print('tensorflow' in sys.modules, 'jax' in sys.modules)"
  )
  output = subprocess.run(
    [sys.executable, "-c", program],
    check=True,
    capture_output=True,
    text=True,
  ).stdout.splitlines()
  assert output == [str([r.id for r in source]), "False False"]


@pytest.mark.parametrize(
  ("name", "task", "split", "options", "message"),
  [
    ("", "vqa", "train", {}, "options.name is missing"),
    (COCO, "vqqa", "train", {}, 'no task "vqqa".*Did you mean "vqa"'),
    ("a b", "vqa", "train", {}, '"a b" is not the name of a data set'),
    (
      "coco_captoins",
      "caption",
      "train",
      {},
      "not prepared.*The folder has: coco_captions/2014, my_data,.*"
      r'builder\("coco_captoins", data_dir=".*", file_format="array_record"\)',
    ),
    (
      "ref_coco/refcoco_unk",
      "grounding",
      "train",
      {},
      'not prepared.*Did you mean "ref_coco/refcoco_unc"',
    ),
    ("ref_coco:9.9.9", "grounding", "train", {}, "not prepared"),
    (COCO, "caption", "trian", {}, 'no split "trian".*Did you mean "train"'),
    (COCO, "caption", "train[:x]", {}, r'no split "train\[:x\]"'),
    (COCO, "caption", "train[:0]", {}, r'"train\[:0\]".*is empty'),
    (COCO, "vqa", "train", {}, "coco_captions needs a feature.*fields.prompt="),
    ("my_data", "vqa", "train", {}, "field image, prompt, target of the task"),
    (
      "my_data",
      "vqa",
      "train",
      {"fields": {**VQA, "anwser": "answers"}},
      'unknown field "anwser"',
    ),
    (
      "my_data",
      "vqa",
      "train",
      {"fields": {**VQA, "target": "answer"}},
      'no feature "answer" for fields.target.*"answers"',
    ),
    (
      "my_data",
      "vqa",
      "train",
      {"fields": {**VQA, "kind": "packed"}},
      'feature "packed".*cannot be read',
    ),
    (
      "my_data",
      "grounding",
      "train",
      {"fields": {"image": "photo", "prompt": "question", "box": "xywh"}},
      '"xywh" does not state.*options.box_format to one of REL_YXYX',
    ),
    (
      REFCOCO,
      "grounding",
      "train",
      {"box_format": "xyxy"},
      'box_format is "xyxy"',
    ),
    (COCO, "caption", "train", {"each": "caption"}, 'Did you mean "captions"'),
    (
      COCO,
      "caption",
      "train",
      {"each": "objects"},
      'no field is in options.each="objects"',
    ),
  ],
)
def test_mistakes_are_explained(
  opened: Any,
  name: str,
  task: str,
  split: str,
  options: dict[str, Any],
  message: str,
) -> None:
  with pytest.raises(UserError, match=message) as error:
    opened(name, task, split, **options)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("task", "fields", "message"),
  [
    ("vqa", {**VQA, "image": "caption"}, "the image is in no known format"),
    ("vqa", {**VQA, "image": "code"}, "not an encoded picture"),
    ("vqa", {**VQA, "prompt": "answers"}, "3 texts in place of one"),
    ("vqa", {**VQA, "score": "code"}, "3 answers have 1 scores"),
    ("entailment", {**VQA}, "there are 3 labels"),
    ("entailment", {**VQA, "target": "best"}, 'label "dog" is unknown'),
  ],
)
def test_bad_records(
  opened: Any, task: str, fields: dict[str, str], message: str
) -> None:
  record = None
  with pytest.raises(UserError, match=message):  # noqa: PT012
    record = opened("my_data", task, fields=fields)[0]
    images.original_size(record.image)


def copy_of(prepared: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  folder = target / "copy"
  shutil.copytree(prepared / "ref_coco" / "refcoco_unc" / "1.1.0", folder)
  return folder


def test_other_file_formats_are_explained(
  prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  folder = copy_of(prepared, tmp_path)
  path = folder / "dataset_info.json"
  info = json.loads(path.read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  path.write_text(json.dumps(info))
  message = 'prepared as tfrecord.*builder.*data_dir="FOLDER".*"array_record"'
  with pytest.raises(UserError, match=message):
    load_source("tfds", task="grounding", split="train", name=str(folder))


def test_missing_and_damaged_files(
  prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  folder = copy_of(prepared, tmp_path)
  options: Any = {"name": str(folder), "index_dir": str(tmp_path / "index")}
  whole = list(load_source("tfds", task="grounding", split="train", **options))
  (path,) = folder.glob("*train*")
  data = bytearray(path.read_bytes())
  # Inside the second of the seven examples.
  data[3000] ^= 1
  path.write_bytes(data)
  source = load_source("tfds", task="grounding", split="train", **options)
  good, bad = [], []
  for index in range(len(source)):
    try:
      good.append(source[index].id)
    except UserError as e:
      bad.append(str(e))
  assert len(bad) == 1
  assert "the stored example cannot be read" in bad[0]
  lost = [r for r in whole if r.id not in good]
  assert len(good) + len(lost) == 9
  assert len({bytes(r.image) for r in lost}) <= 1
  path.unlink()
  with pytest.raises(UserError, match=r"the file .* is missing; prepare"):
    load_source("tfds", task="grounding", split="train", **options)
