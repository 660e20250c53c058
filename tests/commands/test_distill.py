"""`python -m narvl_jax.distill`: a run labels its own data, and others."""

import filecmp
import json
import math
import pathlib
import shutil
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.shards import conversion
from narvl_jax.data.shards import writer as shard_writer
from narvl_jax.data.shards.distilled import DistilledSet
from narvl_jax.data.sources import load_source, open_source
from narvl_jax.data.sources.subset import Subset
from narvl_jax.errors import UserError
from narvl_jax.evaluation import labelling
from narvl_jax.evaluation.distillation import Options, distill
from narvl_jax.prediction.predictor import Predictor
from tests.evaluation import tiny_run
from tests.support.processes import start_together

SIZES: dict[str, Any] = {"max_examples": 20, "shard_size": 8}


def label(to: pathlib.Path, **options: Any) -> list[DistilledSet]:
  options = {"datasets": ["vqa"], **SIZES, **options}
  return distill(Options(str(tiny_run.tiny_run()), str(to), **options))


def records_of(found: DistilledSet) -> list[Any]:
  source = load_source(
    found.source, task=found.task, split=found.split, **found.options
  )
  return [source[i] for i in range(len(source))]


def same(left: pathlib.Path, right: pathlib.Path) -> bool:
  names = sorted(str(p.relative_to(left)) for p in left.rglob("*.*"))
  assert names == sorted(str(p.relative_to(right)) for p in right.rglob("*.*"))
  _, differing, errors = filecmp.cmpfiles(left, right, names, shallow=False)
  return not differing and not errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
  """Questions that were labelled without a break."""
  folder = tmp_path_factory.mktemp("whole") / "out"
  label(folder)
  return folder


def test_targets_are_the_answers_of_the_teacher(tmp_path, capsys):
  captions, questions = label(tmp_path / "out", datasets=["caption", "vqa"])
  experiment, variables = tiny_run.tiny_model()
  predictor = Predictor(experiment, variables)
  for found in (captions, questions):
    original = open_source(
      "shapes", task=found.task, split="train", image_size=32
    )
    # On one device, where the teacher used all of them.
    said = list(
      predictor.answers(Subset(original, range(20)), found.task, batch_size=16)
    )
    made = records_of(found)
    assert len(made) == len(said) == 20
    for new, answer in zip(made, said, strict=True):
      assert new.answers == {answer.value: 1.0}
      assert new.score == pytest.approx(math.log(answer.probability), rel=1e-3)
      assert (new.id, new.prompt) == (answer.record.id, answer.record.prompt)
  text = " ".join(capsys.readouterr().out.split())
  assert f"vqa: 20 records of vqa for step {tiny_run.STEP} of" in text
  assert "vqa: 20 records, 20 answers, 0.0% of them equal to the orig" in text
  assert "examples/s" in text
  assert f'add_distilled(config, "{tmp_path / "out"}", weight=0.5)' in text


def test_the_manifest_names_the_teacher(whole):
  manifest = json.loads((whole / "vqa" / "manifest.json").read_text())
  source = manifest["source"]
  assert source["teacher"] == str(tiny_run.tiny_run())
  assert source["checkpoint_step"] == tiny_run.STEP
  experiment, _ = tiny_run.tiny_model()
  assert source["vocabulary"] == experiment.vocabulary.fingerprint
  assert source["decoding"]["method"] == "greedy"
  assert source["options"] == {"image_size": 32}
  assert (manifest["records"], manifest["labels"]["teacher"]) == (20, 20)
  assert [shard["records"] for shard in manifest["shards"]] == [6, 7, 7]


def test_answers_of_no_use_leave_the_targets(tmp_path, capsys):
  (found,) = label(tmp_path, datasets=["entailment"])
  original = open_source(
    "shapes", task="entailment", split="train", image_size=32
  )
  kept = 0
  for new, old in zip(records_of(found), original, strict=False):
    if new.score is None:
      kept += 1
      assert new.answers == old.answers
    else:
      assert new.answers.keys() <= {"yes", "no", "maybe"}
  assert kept
  assert (found.manifest.labels or {})["original"] == kept
  line = f"{kept} of no use, the original target kept"
  assert line in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["array_record", "tsv"])
def test_an_interrupted_one_resumes(tmp_path, monkeypatch, whole, kind):
  options = {"file_format": kind}
  if kind == "tsv":
    label(tmp_path / "whole", **options)
    whole = tmp_path / "whole"
  folder = tmp_path / "out"
  answered = []
  answer = labelling.Labeller._answer

  def counted(self, predictor, job, source, number, *rest):
    answered.append(number)
    if number == 1 and len(answered) == 2:
      raise KeyboardInterrupt
    return answer(self, predictor, job, source, number, *rest)

  monkeypatch.setattr(labelling.Labeller, "_answer", counted)
  with pytest.raises(KeyboardInterrupt):
    label(folder, **options)
  assert len(list(folder.glob("vqa/vqa-train-*"))) == 1
  assert not (folder / "vqa" / "manifest.json").exists()
  label(folder, **options)
  assert answered == [0, 1, 1, 2]
  assert same(folder, whole)


def test_a_half_written_shard_is_written_again(tmp_path, monkeypatch, whole):
  folder = tmp_path / "out"
  write = shard_writer._write

  def full(source, job, number, path, bad):
    outcome = write(source, job, number, path, bad)
    if number == 1:
      raise OSError(28, "No space left on device")
    return outcome

  with monkeypatch.context() as patch:
    patch.setattr(shard_writer, "_write", full)
    with pytest.raises(UserError, match=r"No space left on device; make room"):
      label(folder)
  label(folder)
  assert same(folder, whole)


def test_complete_data_needs_no_weights(whole, monkeypatch, capsys):
  monkeypatch.setattr(labelling, "load_run", None)
  (found,) = label(whole)
  assert found.manifest.records == 20
  text = capsys.readouterr().out
  assert "vqa is complete: 20 records" in text
  assert "examples/s" not in text


def write_jsonl(folder: pathlib.Path) -> pathlib.Path:
  """Writes ten questions, of which one has no picture and one no answer."""
  rows = []
  for number in range(10):
    name = f"{number}.png"
    pixels = np.full((20, 30, 3), 20 * number, np.uint8)
    Image.fromarray(pixels).save(folder / name)
    rows.append({"image": name, "prompt": f"which {number}?", "target": "one"})
  (folder / "3.png").write_bytes(b"torn")
  del rows[5]["target"]
  path = folder / "own.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def test_data_of_others(tmp_path, capsys):
  path = write_jsonl(tmp_path)
  given = {"spec": str(path), "task": "vqa", "datasets": ()}
  with pytest.raises(UserError, match=r"1 of 10 records are bad.*own.jsonl ro"):
    label(tmp_path / "strict", **given, max_bad_fraction=0.05)
  (found,) = label(tmp_path / "out", **given, max_bad_fraction=0.2)
  assert found.name == "own"
  (bad,) = found.manifest.bad_records
  assert bad["index"] == 3
  assert bad["place"] == f"{path} row 4"
  assert "image is in no known format" in bad["reason"]
  labels = found.manifest.labels or {}
  assert (found.manifest.records, labels["teacher"]) == (9, 9)
  assert labels["compared"] == 8
  assert "1 bad records left out" in capsys.readouterr().out
  assert records_of(found)[0].image == (tmp_path / "0.png").read_bytes()


def test_a_host_writes_only_its_own_shards(tmp_path, monkeypatch):
  job, _ = conversion.plan(
    "shapes",
    str(tmp_path),
    task="vqa",
    split="train",
    options={"image_size": 32},
    limit=6,
    shards=3,
  )
  (tmp_path / shard_writer.PROGRESS).mkdir()
  second = types.SimpleNamespace(
    process_count=lambda: 2, process_index=lambda: 1
  )
  gathered = []

  def gather(value):
    gathered.append(value)
    return [value or {"shard": "of the first"}, value]

  # Read before the hosts are two: they check its checkpoint together.
  teacher = labelling.Labeller(tiny_run.tiny_run())
  _ = teacher._loaded
  monkeypatch.setattr(labelling, "jax", second)
  monkeypatch.setattr(labelling.distributed, "gather_json", gather)
  notes = list(teacher.write(job, [0, 1, 2]))
  assert [number for number, _ in notes] == [0, 1, 2]
  # Answers of two shards, its note, answers of one, nothing to write.
  assert [type(value) for value in gathered] == [
    *(list, list, dict, list, type(None)),
  ]
  assert [path.name for path in tmp_path.glob("vqa*")] == [job.file(1)]


@pytest.mark.slow
def test_two_hosts_share_the_work(tmp_path, whole):
  """Each writes shards, no record twice; one resumes where two stopped."""
  folder = tmp_path / "out"
  arguments = [
    *("-m", "narvl_jax.distill", f"--teacher={tiny_run.tiny_run()}"),
    *(f"--to={folder}", "--datasets=vqa", "--max_examples=20"),
    "--shard_size=8",
  ]
  hosts = start_together(tmp_path / "logs", arguments)
  assert [host.wait() for host in hosts] == [0, 0], hosts[0].errors
  assert "20 records, 20 answers" in hosts[0].output
  assert "00001-of-00003" in hosts[0].output
  shutil.rmtree(folder / "logs")
  ours, theirs = (records_of(label(path)[0]) for path in (folder, whole))
  assert [r.id for r in ours] == [r.id for r in theirs]
  assert [r.answers for r in ours] == [r.answers for r in theirs]
  assert shard_writer.PROGRESS not in [p.name for p in folder.rglob("*")]
