"""`python -m narvl_jax.predict`: one picture, one question, every mistake."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from narvl_jax.data.example import Record
from narvl_jax.errors import UserError
from narvl_jax.evaluation import evaluator, outcomes
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.predict import Options, predict
from narvl_jax.prediction import foreign_input
from narvl_jax.prediction import request as request_lib
from narvl_jax.prediction.predictor import Predictor
from narvl_jax.prediction.request import Request
from narvl_jax.run_folder import workdir as workdir_lib
from tests.evaluation import tiny_run

QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return tiny_run.copy_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture
def photo(tmp_path: pathlib.Path) -> pathlib.Path:
  path = tmp_path / "photo.jpg"
  _noise((60, 90, 3)).save(path)
  return path


def _noise(shape: tuple[int, ...]) -> Image.Image:
  rng = np.random.default_rng(0)
  return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def test_answer_to_a_question_about_a_photo(workdir, photo):
  outcome = predict(workdir, Request(task="vqa", image=photo, prompt=QUESTION))
  assert list(outcome) == [
    *("step", "task", "image", "prompt", "answer", "probability"),
    *("query_entropy", "warnings"),
  ]
  assert len(outcome["query_entropy"]) == tiny_run.MODEL["num_queries"]
  assert all(0 <= x <= np.log(500) for x in outcome["query_entropy"])
  # 90 x 60 pixels are near enough to 32 x 32, and all words were learned.
  assert outcome["warnings"] == []
  assert outcome["step"] == tiny_run.STEP
  assert outcome["image"] == str(photo)
  assert outcome["prompt"] == QUESTION
  assert isinstance(outcome["answer"], str)
  assert 0 < outcome["probability"] <= 1


@pytest.mark.parametrize("flag", ["prompt", "premise"])
def test_a_text_that_has_no_tokens(workdir, photo, flag):
  texts: Any = {"prompt": QUESTION, flag: "two\udcff"}
  message = rf"--{flag}: the text has half of a surrogate pair, .udcff, as its"
  with pytest.raises(UserError, match=message):
    predict(workdir, Request(task="entailment", image=photo, **texts))


@pytest.mark.parametrize("setting", ["ignore", "apply"])
def test_orientation_is_that_of_the_run(workdir, photo, monkeypatch, setting):
  exif = Image.Exif()
  exif[0x0112] = 6
  _noise((60, 90, 3)).save(photo, exif=exif)
  read_config = workdir_lib.read_config

  def changed(folder):
    config = read_config(folder)
    config.data.exif_orientation = setting
    return config

  def stop(record, settings):
    sizes.append(record.image.shape[:2])
    raise UserError("enough")

  sizes = []
  monkeypatch.setattr(workdir_lib, "read_config", changed)
  monkeypatch.setattr(request_lib, "_check_texts", stop)
  with pytest.raises(UserError, match="enough"):
    predict(workdir, Request(task="vqa", image=photo, prompt=QUESTION))
  assert sizes == [(90, 60) if setting == "apply" else (60, 90)]


@pytest.mark.parametrize("task", ["caption", "vqa", "grounding", "entailment"])
def test_examples_get_the_answer_of_the_evaluation(workdir, task):
  experiment, variables = tiny_run.tiny_model()
  _, predictions = evaluator.evaluate_tasks(
    experiment, variables, split="test", max_examples=4000 // 500, batch_size=16
  )
  expected = next(
    p for p in predictions if p["task"] == task and p["index"] == 500
  )
  outcome = predict(workdir, Request(task=task, example=500))
  answer = expected["prediction"]
  if task == "grounding" and not any(answer):
    answer = None
  assert outcome["answer"] == answer
  assert outcome["truth"] == expected["target"]
  assert outcome["prompt"] == expected["prompt"]
  assert outcome["probability"] == pytest.approx(
    expected["probability"], rel=1e-3
  )
  saved = workdir / "predictions" / f"example_{task}_500.png"
  source = load_dataset(experiment.config, task, "test")
  np.testing.assert_array_equal(Image.open(saved), source[500].image)
  # The saved picture is an input like any other.
  again = predict(
    workdir, Request(task=task, image=saved, prompt=outcome["prompt"])
  )
  assert again["answer"] == outcome["answer"]
  assert "truth" not in again


@pytest.mark.parametrize(
  ("prompt", "words"),
  [
    (QUESTION, None),
    ("is this a photograph?", '"this", "photograph"'),
    ("où est le 汉字 🙂?", '"où", "est", "le", "汉字", "🙂?"'),
    ("ab bb cc dd ee ff gg", '"ab", "bb", "cc", "dd", "ee" and 2 more'),
  ],
)
def test_unknown_words_are_named(prompt, words):
  experiment, _ = tiny_run.tiny_model()
  image = np.zeros((32, 32, 3), np.uint8)
  record = Record("x", "vqa", image, prompt=prompt)
  found = foreign_input.warnings_about(experiment, record)
  expected = [
    f"unknown words: {words} (not in the texts from which the vocabulary of"
    " this run was trained); the answer may be meaningless"
  ]
  assert found == (expected if words else [])


@pytest.mark.parametrize(
  ("size", "parts"),
  [
    ((32, 32), []),
    ((60, 90), []),
    ((128, 96), []),
    ((200, 200), ["of 200x200 pixels .* reduced to 32x32 .* than 6 pixels"]),
    ((7, 7), ["of 7x7 pixels .* enlarged to 32x32"]),
    ((20, 60), [r"of 60x20 pixels .* squeezed .* shrinks 3\.0 times as much"]),
    ((3000, 400), ["reduced to 32x32", r"squeezed to 32x32.* 7\.5 times"]),
  ],
)
def test_resizing_that_matters_is_named(size, parts):
  experiment, _ = tiny_run.tiny_model()
  record = Record("x", "vqa", np.zeros((*size, 3), np.uint8), prompt=QUESTION)
  found = foreign_input.warnings_about(experiment, record)
  assert len(found) == len(parts)
  for text, part in zip(found, parts, strict=True):
    assert re.search(part, text)
  # Data of the run itself are what it was trained for.
  assert not foreign_input.warnings_about(experiment, record, resized=False)


def test_examples_of_other_splits_and_data_sets(workdir):
  experiment, _ = tiny_run.tiny_model()
  source = load_dataset(experiment.config, "vqa", "validation")
  outcome = predict(workdir, Request(task="vqa", example=4, split="validation"))
  assert outcome["prompt"] == source[4].prompt
  again = predict(
    workdir, Request(task="vqa", example=4, split="validation", dataset="vqa")
  )
  assert again["answer"] == outcome["answer"]
  with pytest.raises(
    UserError,
    match=r'no "caption" for the task vqa\. Valid: vqa\. \(--dataset\)',
  ):
    predict(workdir, Request(task="vqa", example=4, dataset="caption"))


def test_another_prompt_for_an_example_has_no_known_truth(workdir):
  outcome = predict(workdir, Request(task="vqa", example=0, prompt=QUESTION))
  assert outcome["prompt"] == QUESTION
  assert "truth" not in outcome


def test_premise_changes_the_request(workdir):
  def ask(premise):
    return predict(
      workdir,
      Request(
        task="entailment", example=3, prompt="it is red", premise=premise
      ),
    )["probability"]

  assert ask("a red circle and a blue square") != ask(None)


def test_box_is_in_pixels_of_the_photo(workdir, photo, monkeypatch, tmp_path):
  experiment, _ = tiny_run.tiny_model()
  vocabulary = experiment.vocabulary
  ids = [vocabulary.bin_start + k for k in (0, 3, 15, 9)]
  # Three of four coordinates are certain; one time in four y1 is 15, which
  # leaves an IoU of one half.
  bins = np.array([[[[0, 1], [3, 1], [15, 1], [9, 15]]]])
  probs = np.array([[[1, 0], [1, 0], [1, 0], [0.75, 0.25]]])
  sharp = {"coordinate_bins": bins[0], "coordinate_probs": probs}
  # What the model predicts is fixed; everything around it is real.
  monkeypatch.setattr(
    Predictor, "_start", lambda *_: _decoded(ids, 0.25, sharp)
  )
  overlay = tmp_path / "new" / "box.png"
  outcome = predict(
    workdir,
    Request(task="grounding", image=photo, prompt="the red circle"),
    Options(overlay=overlay),
  )
  # 90 x 60 pixels, 16 bins.
  np.testing.assert_allclose(outcome["answer"], [0, 12, 90, 36], rtol=1e-6)
  assert outcome["overlay"] == str(overlay)
  picture = np.asarray(Image.open(overlay))
  orange = np.argwhere(np.all(picture == (214, 69, 0), axis=-1))
  # 90 pixels grow fivefold; the legend is below them.
  orange = orange[orange[:, 0] < 60 * 5]
  np.testing.assert_allclose(orange.min(0), (60, 0), atol=2)
  np.testing.assert_allclose(orange.max(0), (180, 449), atol=2)
  text = outcomes.format_outcome(outcome)
  assert "box:         0.0, 12.0, 90.0, 36.0 (x0, y0, x1, y1" in text
  assert "probability: 25.0 %" in text
  assert "IoU >= 0.5:  100.0 %" in text
  assert outcome["probability_iou50"] == 1


def test_incomplete_box_is_no_box(workdir, photo, monkeypatch):
  experiment, _ = tiny_run.tiny_model()
  ids = [experiment.vocabulary.bin_start] * 3
  monkeypatch.setattr(Predictor, "_start", lambda *_: _decoded(ids, 0.5))
  outcome = predict(
    workdir, Request(task="grounding", image=photo, prompt="circle")
  )
  assert outcome["answer"] is None
  overlay = workdir / "predictions" / "overlay_photo.png"
  assert outcome["overlay"] == str(overlay)
  assert overlay.exists()
  assert "no complete box" in outcomes.format_outcome(outcome)


def _decoded(
  ids: list[int], probability: float, details: Mapping[str, np.ndarray] = {}
) -> dict[str, np.ndarray]:
  return {
    **details,
    "ids": np.array([[ids]]),
    "lengths": np.array([[len(ids)]]),
    "log_probs": np.log([[probability]]),
  }


@pytest.mark.parametrize(
  ("name", "picture"),
  [
    ("alpha.png", _noise((20, 30, 4))),
    ("grey.png", _noise((20, 30))),
    ("palette.png", _noise((20, 30, 3)).quantize(16)),
    ("dot.png", _noise((1, 1, 3))),
    ("line.png", _noise((1, 900, 3))),
    ("sixteen.png", Image.fromarray(np.full((20, 30), 40000, np.uint16))),
  ],
)
def test_unusual_pictures_are_read(workdir, tmp_path, name, picture):
  picture.save(tmp_path / name)
  outcome = predict(workdir, Request(task="caption", image=tmp_path / name))
  assert isinstance(outcome["answer"], str)
  outcome = predict(
    workdir, Request(task="grounding", image=tmp_path / name, prompt="it")
  )
  assert pathlib.Path(outcome["overlay"]).exists()


def _jpeg(size: tuple[int, int]) -> bytes:
  file = io.BytesIO()
  _noise((*size, 3)).save(file, format="JPEG")
  return file.getvalue()


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (b"", r'--image=".*bad.jpg": the image is empty'),
    (b"\x00" * 300, r'--image=".*bad.jpg": the image is in no known format'),
    (
      _jpeg((40, 40))[:700],
      r'--image=".*bad.jpg": the image is damaged or cut',
    ),
    (b"hello, this is text", r'bad.jpg": .* use a JPEG or PNG'),
  ],
)
def test_unreadable_pictures(workdir, tmp_path, data, message):
  path = tmp_path / "bad.jpg"
  path.write_bytes(data)
  with pytest.raises(UserError, match=message):
    predict(workdir, Request(task="vqa", image=path, prompt=QUESTION))


def test_huge_picture(workdir, tmp_path):
  path = tmp_path / "huge.png"
  Image.new("1", (8950, 9000)).save(path)
  with pytest.raises(UserError, match=r"8950 x 9000 pixels; the limit is"):
    predict(workdir, Request(task="caption", image=path))


def test_missing_picture(workdir, tmp_path):
  with pytest.raises(UserError, match=r'cannot read the image ".*none.jpg"'):
    predict(
      workdir, Request(task="vqa", image=tmp_path / "none.jpg", prompt=QUESTION)
    )
  with pytest.raises(UserError, match=r"cannot read the image .*directory"):
    predict(workdir, Request(task="vqa", image=tmp_path, prompt=QUESTION))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, r"either --image=FILE or --example=INDEX"),
    ({"image": "a.png", "example": 0}, r"either --image=FILE or --example"),
    ({"example": 0, "task": "vqq"}, r'unknown task "vqq"\. Did you mean "vqa"'),
    ({"example": 0}, r"no task was given\. Valid: caption, .* Set --task"),
    (
      {"example": 4000, "task": "vqa"},
      r"--example=4000 is outside of the 4000 records .* --example=3999",
    ),
    ({"example": -1, "task": "vqa"}, r"--example=-1 .* nearest .*--example=0"),
    (
      {"example": 0, "task": "vqa", "prompt": ""},
      r"the prompt of vqa .* is empty .*--prompt",
    ),
    (
      {"example": 0, "task": "grounding", "prompt": "?!"},
      r"the prompt of grounding .* is empty",
    ),
    (
      {"example": 0, "task": "entailment", "prompt": ""},
      r"the prompt of entailment .* is empty",
    ),
    (
      {"example": 0, "task": "vqa", "prompt": "is it " * 40 + "red?"},
      r"--prompt has 81 words, the run reads at most 80",
    ),
    (
      {"example": 0, "task": "vqa", "prompt": "quizzical " * 20},
      r"the prompt of vqa .* has \d+ tokens .* the limit is 40; shorten it",
    ),
    (
      {"example": 0, "task": "entailment", "premise": "so " * 90},
      r"--premise has 90 words, the run reads at most 80",
    ),
  ],
)
def test_wrong_arguments(workdir, arguments, message):
  with pytest.raises(UserError, match=message) as error:
    predict(workdir, Request(**arguments))
  assert "\n" not in str(error.value)


def test_an_unknown_checkpoint_is_named(workdir):
  with pytest.raises(UserError, match=r'no checkpoint "9"; this run has 7'):
    predict(workdir, Request("vqa", example=0), Options(checkpoint="9"))


def test_missing_run_and_missing_checkpoint(workdir, photo, tmp_path):
  request = {"task": "vqa", "image": photo, "prompt": QUESTION}
  with pytest.raises(UserError, match=r"nowhere has no run"):
    predict(tmp_path / "nowhere", Request(**request))
  fresh = shutil.copytree(workdir, tmp_path / "fresh")
  shutil.rmtree(fresh / "checkpoints")
  with pytest.raises(UserError, match=r"no checkpoint yet"):
    predict(fresh, Request(**request))


def test_answers_without_effect_are_rejected(workdir, photo):
  request = {"task": "vqa", "image": photo, "prompt": QUESTION}
  with pytest.raises(UserError, match=r'"a.txt" changes nothing.*--constrain'):
    predict(workdir, Request(**request), Options(answers="a.txt"))


def test_the_only_task_need_not_be_named():
  assert request_lib._choose_task(["vqa"], None) == "vqa"
  with pytest.raises(UserError, match=r'unknown task "caption"\. Valid: vqa'):
    request_lib._choose_task(["vqa"], "caption")


def test_lines_for_people():
  outcome = {
    "step": 7,
    "task": "vqa",
    "image": "photo.jpg",
    "prompt": QUESTION,
    "answer": "red",
    "probability": 0.931,
    "truth": "blue",
  }
  assert outcomes.format_outcome(outcome).splitlines() == [
    "image:       photo.jpg",
    "prompt:      what color is the circle?",
    "vqa:         red",
    "probability: 93.1 %",
    "truth:       blue",
  ]
  empty = outcomes.format_outcome(outcome | {"answer": ""})
  assert "vqa:         (empty)" in empty


def _command(*flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.predict", *flags],
    capture_output=True,
    text=True,
    check=False,
  )


def test_command_prints_json(workdir, photo):
  result = _command(
    f"--workdir={workdir}",
    f"--image={photo}",
    "--task=vqa",
    f"--prompt={QUESTION}",
    "--json",
  )
  assert result.returncode == 0, result.stderr
  outcome = json.loads(result.stdout)
  expected = predict(workdir, Request(task="vqa", image=photo, prompt=QUESTION))
  assert outcome["answer"] == expected["answer"]


def test_command_ends_in_one_line(workdir, photo):
  result = _command(f"--workdir={workdir}", f"--image={photo}", "--task=vqq")
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.splitlines() == [
    'error: unknown task "vqq". Did you mean "vqa"? Set --task.'
  ]
