"""`python -m narvl_jax.distill`: mistakes, reported before any write."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from narvl_jax.errors import UserError
from narvl_jax.evaluation import labelling
from narvl_jax.evaluation.distillation import Options, distill
from tests.commands.test_distill import SIZES, label
from tests.evaluation import tiny_run

DATA = ("train", "evaluation")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
  """Questions that were labelled."""
  folder = tmp_path_factory.mktemp("whole") / "out"
  label(folder)
  return folder


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_examples": 19}, r"source.records=20, this command has 19"),
    ({"shard_size": 20}, r"shards=3, this command has 1"),
    ({"file_format": "tsv"}, r"source.format='array_record', .* has 'tsv'"),
    ({"split": "test"}, r"with name='vqa-train', this command has 'vqa-test'"),
    (
      {"decoding": {"method": "beam", "beam_size": 2}},
      r"source.decoding.method='greedy', this command has 'beam' \(other"
      r" differences: source.decoding.beam_size\); ",
    ),
  ],
)
def test_other_settings_need_another_folder(whole, options, message):
  with pytest.raises(UserError, match=message + r".*set --to to a new folder"):
    label(whole, **options)


def test_another_checkpoint_needs_another_folder(whole, monkeypatch):
  monkeypatch.setattr(labelling, "read_chosen", lambda *_: 8)
  with pytest.raises(UserError, match=r"checkpoint_step=7, .* has 8"):
    label(whole)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"max_examples": -1}, r"--max_examples=-1 .* --max_examples=0$"),
    ({"batch_size": -1}, r"--batch_size=-1 .* --batch_size=1"),
    ({"shard_size": 0}, r"--shard_size=0 is below 1"),
    ({"datasets": "vqa"}, r'datasets="vqa" is one text; give a list'),
    ({"datasets": ["vqq"]}, r'has no "vqq"\. Did you mean "vqa"'),
    ({"checkpoint": "8"}, r'no checkpoint "8"; this run has 7'),
    ({"spec": "shapes"}, r"--datasets=vqa names entries .* drop one of them"),
    ({"task": "vqa"}, r"--task=vqa is for a data set that is named first"),
    ({"datasets": (), "spec": "shapes"}, r'unknown task ""\. Valid: caption'),
    ({"split": "tset"}, r'unknown split "tset".*Did you mean "test"'),
    ({"decoding": {"method": "beem"}}, r'="beem" is unknown. Did .* "beam"'),
    (
      {"decoding": {"method": "candidates"}, "datasets": ["caption"]},
      r"caption has no set of answers.*or another --decoding",
    ),
    (
      {"decoding": {"method": "greedy", "constrained": True}},
      r"no list of the answers that vqa allows.*--answers=.*\(distill: or an",
    ),
    ({"max_examples": None}, r"too many; .* --max_examples or --shard_size"),
  ],
)
def test_wrong_arguments_write_nothing(tmp_path, options, message):
  with pytest.raises(UserError, match=message) as error:
    label(tmp_path / "out", **options)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "out").exists()


def test_teachers_that_cannot_answer(tmp_path):
  with pytest.raises(UserError, match=r"--teacher=.*nowhere has no run"):
    distill(Options(str(tmp_path / "nowhere"), str(tmp_path / "out")))
  run = tiny_run.copy_run(tmp_path / "run")
  config = json.loads((run / "config.json").read_text())
  for section in (config["tasks"], *map(config["data"].get, DATA)):
    del section["vqa"]
  (run / "config.json").write_text(json.dumps(config))
  with pytest.raises(
    UserError, match=r'not trained on the task "vqa"\. Valid: caption'
  ):
    distill(
      Options(
        str(run), str(tmp_path / "out"), spec="shapes", task="vqa", **SIZES
      )
    )
  with pytest.raises(UserError, match=r'--answers="a.txt" is for vqa, on'):
    distill(Options(str(run), str(tmp_path / "out"), answers="a.txt"))
  shutil.rmtree(run / "checkpoints")
  with pytest.raises(UserError, match="no checkpoint yet"):
    distill(Options(str(run), str(tmp_path / "out")))


def test_the_allowed_answers_are_part_of_the_settings(tmp_path):
  allowed = []
  for answers in ("red\nblue\n", "red\ngreen\n"):
    path = tmp_path / "answers.txt"
    path.write_text(answers)
    teacher = labelling.Labeller(
      tiny_run.tiny_run(), decoding={"constrained": True}, answers=str(path)
    )
    allowed.append(teacher.prepare("vqa")["answers"])
    assert "answers" not in labelling.Labeller(tiny_run.tiny_run()).prepare(
      "vqa"
    )
  assert allowed[0] != allowed[1]


def test_a_folder_of_something_else(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match=r"something else: notes.txt; set --to"):
    label(tmp_path)


def test_the_command_ends_in_one_line(tmp_path):
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.distill", "--teacher=no", "--to=out"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert (result.returncode, result.stdout) == (2, "")
  assert result.stderr == (
    "error: --teacher=no has no run: there is no config.json; pass the"
    " --workdir of a training\n"
  )
  assert list(tmp_path.iterdir()) == []


def test_all_hosts_hear_of_a_full_disk(tmp_path, monkeypatch):
  folder = tmp_path / "out"
  gather = labelling.distributed.gather_json

  def reported(value):
    # Sent by the first of several hosts instead of a note.
    if isinstance(value, dict):
      return [{"error": "cannot write: full"}]
    return gather(value)

  monkeypatch.setattr(labelling.distributed, "gather_json", reported)
  with pytest.raises(UserError, match="cannot write: full"):
    label(folder)
