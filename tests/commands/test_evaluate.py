"""`python -m narvl_jax.evaluate`, from run folder to files."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from narvl_jax.data.sources.shapes import ShapesSource
from narvl_jax.errors import UserError
from narvl_jax.evaluate import Options, evaluate
from narvl_jax.evaluation import evaluator
from narvl_jax.experiment.datasets import load_dataset
from narvl_jax.metrics import captions
from narvl_jax.metrics.cider import DocumentFrequencies
from tests.evaluation import tiny_run


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  return tiny_run.copy_run(tmp_path / "run")


def _limit(workdir: pathlib.Path, count: int) -> None:
  """Limits the examples that the run is evaluated on by its config."""
  path = workdir / "config.json"
  config = json.loads(path.read_text())
  config["evaluation"]["max_examples"] = count
  path.write_text(json.dumps(config))


def test_evaluation_json_has_the_published_schema(workdir, capsys):
  _limit(workdir, 8)
  report = evaluate(workdir)
  written = json.loads((workdir / "evaluation.json").read_text())
  assert written == report
  assert written["split"] == "test"
  assert written["step"] == tiny_run.STEP
  assert written["examples"] == 32
  assert written["decoding"]["vqa"]["method"] == "greedy"
  assert {task: list(x) for task, x in written["tasks"].items()} == {
    "caption": ["exact_match", "token_f1", "cider@simple"],
    "entailment": ["accuracy"],
    "grounding": ["acc@0.5", "acc@0.75", "mean_iou"],
    "vqa": ["accuracy"],
  }
  name = f"test-{tiny_run.STEP}-greedy-max8"
  lines = (workdir / "predictions" / f"{name}.jsonl").read_text().splitlines()
  assert len(lines) == 32
  kept = workdir / "evaluations" / f"{name}.json"
  assert json.loads(kept.read_text()) == report
  output = capsys.readouterr().out
  assert f"test, step {tiny_run.STEP}, greedy, 32 examples, at most 8" in output
  assert "grounding" in output
  assert "wrote " in output
  assert " ± " in output
  assert "entailment: truth" in output
  assert written["intervals"].keys() == written["tasks"].keys()
  assert (written["metrics"], written["cider_df"]) == ("cheap", "")


def test_split_is_chosen_by_flag(workdir):
  report = evaluate(
    workdir,
    Options(split="held_out", checkpoint="last", max_examples=3, batch_size=5),
  )
  assert report["split"] == "held_out"
  assert report["examples"] == 12
  name = f"held_out-{tiny_run.STEP}-greedy-max3"
  assert (workdir / "predictions" / f"{name}.png").exists()


def test_an_evaluation_keeps_the_results_of_others(workdir):
  _limit(workdir, 3)
  main = evaluate(workdir)
  evaluate(workdir, Options(max_examples=2))
  evaluate(workdir, Options(tasks=["vqa"]))
  evaluate(
    workdir, Options(checkpoint=tiny_run.STEP, decoding={"constrained": False})
  )
  evaluate(
    workdir, Options(tasks=["grounding"], decoding={"constrained": True})
  )
  assert json.loads((workdir / "evaluation.json").read_text()) == main
  names = {path.stem for path in (workdir / "evaluations").iterdir()}
  assert names == {
    f"test-{tiny_run.STEP}-greedy{more}"
    for more in ("-max3", "-max2", "-max3-vqa", "-constrained-max3-grounding")
  }


def test_a_cheap_evaluation_keeps_what_all_metrics_gave(workdir, monkeypatch):
  figure = captions.CaptionFigure("bleu_4", 0.25, statistics=np.ones((2, 2)))
  monkeypatch.setattr(captions, "coco_figures", lambda *_: [figure])
  _limit(workdir, 2)
  main, name = workdir / "evaluation.json", f"test-{tiny_run.STEP}-greedy-max2"
  evaluate(workdir, Options(metrics="all"))
  every = json.loads(main.read_text())
  assert every["tasks"]["caption"]["bleu_4"] == 0.25
  cheap = evaluate(workdir)
  stored = {
    path.stem: json.loads(path.read_text())
    for path in (workdir / "evaluations").iterdir()
  }
  assert stored == {f"{name}-all": every, name: cheap}
  assert json.loads(main.read_text()) == every
  for stem in stored:
    assert (workdir / "predictions" / f"{stem}.jsonl").is_file()
  # Other figures, as those of another checkpoint, replace the file.
  every["tasks"]["vqa"]["accuracy"] = 0.123
  main.write_text(json.dumps(every))
  evaluate(workdir)
  assert json.loads(main.read_text()) == cheap


def test_bad_records_may_be_allowed_by_flag(workdir, monkeypatch):
  read = ShapesSource._read

  def damaged(self, number):
    if number == 0:
      raise ValueError("torn")
    return read(self, number)

  monkeypatch.setattr(ShapesSource, "_read", damaged)
  with pytest.raises(UserError, match=r"\(evaluate: --max_bad_fraction\)"):
    evaluate(workdir, Options(max_examples=4))
  report = evaluate(workdir, Options(max_examples=4, max_bad_fraction=0.5))
  assert report["examples"] == 12


def test_answers_of_a_file(workdir, tmp_path):
  answers = tmp_path / "answers.txt"
  answers.write_text("yes\nred\n")
  evaluate(
    workdir,
    Options(
      max_examples=4,
      answers=str(answers),
      decoding={"constrained": True},
      tasks=["vqa"],
    ),
  )
  (path,) = (workdir / "predictions").glob(
    f"test-{tiny_run.STEP}-greedy-constrained-answers_????????-max4-vqa.jsonl"
  )
  lines = path.read_text().splitlines()
  said = [json.loads(line)["prediction"] for line in lines]
  assert len(said) == 4
  assert {*said} <= {"yes", "red"}


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"split": "tset"}, r'unknown split "tset".*Did you mean "test"'),
    ({"checkpoint": "8"}, r'no checkpoint "8".*7'),
    ({"checkpoint": "bset"}, r'no checkpoint "bset"'),
    ({"max_examples": -1}, r"--max_examples=-1 .* --max_examples=0$"),
    ({"tasks": ["vqaa"]}, r'no task "vqaa".*Did you mean "vqa"'),
    ({"batch_size": -1}, r"--batch_size=-1 .* --batch_size=1"),
    ({"metrics": "al"}, r'--metrics="al" is unknown.*Did you mean "all"'),
    ({"cider_df": "no.tsv"}, r'"no.tsv": No such file'),
    ({"tasks": "vqa,caption"}, r"one text; give .* tasks=\['vqa', 'caption'\]"),
    ({"answers": "a.txt"}, r'="a.txt" changes nothing.*add --constrained'),
    (
      {"answers": "a.txt", "tasks": ["caption"]},
      r'="a.txt" is for vqa; the task is caption',
    ),
  ],
)
def test_wrong_arguments_write_nothing(workdir, arguments, message):
  with pytest.raises(UserError, match=message):
    evaluate(workdir, Options(**arguments))
  assert not (workdir / "evaluation.json").exists()
  assert not (workdir / "predictions").exists()


def test_frequencies_must_count_words_of_a_computed_figure(workdir, tmp_path):
  path = tmp_path / "df.tsv"
  DocumentFrequencies(9, {"red": 2}, "ptb").save(path)
  with pytest.raises(UserError, match=r"tokenizer ptb.*add --metrics=all"):
    evaluate(workdir, Options(cider_df=str(path)))
  DocumentFrequencies(9, {"red": 2}, "simple").save(path)
  report = evaluate(
    workdir, Options(cider_df=str(path), max_examples=2, tasks=["caption"])
  )
  assert report["cider_df"] == str(path)


def test_annotations_make_figures_of_papers(workdir, tmp_path):
  path = tmp_path / "annotations.json"
  source = load_dataset(tiny_run.tiny_config(), "vqa", "test")
  entries = [
    {
      "question_id": source[i].id,
      "question_type": "what" if i else "how many",
      "answer_type": "other",
      "answers": [{"answer": "red"}] * 10,
    }
    for i in range(3)
  ]
  path.write_text(json.dumps({"annotations": entries}))
  with pytest.raises(UserError, match=r"for one data set, but .*vqa.*--tasks"):
    evaluate(workdir, Options(annotations=str(path)))
  with pytest.raises(UserError, match=r"of 6 records have no annotation"):
    evaluate(
      workdir, Options(annotations=str(path), tasks=["vqa"], max_examples=6)
    )
  entries[1:] = [
    {**entries[1], "question_id": source[i].id} for i in range(1, len(source))
  ]
  path.write_text(json.dumps({"annotations": entries}))
  report = evaluate(
    workdir, Options(annotations=str(path), tasks=["vqa"], max_examples=6)
  )
  assert list(report["tasks"]["vqa"]) == ["accuracy", "vqa_accuracy"]
  assert list(report["kinds"]["vqa"]) == ["other"]
  groups = report["question_types"]["vqa"]
  assert {k: x["examples"] for k, x in groups.items()} == {
    "how many": 1,
    "what": 5,
  }
  assert list(report["intervals"]["vqa"]) == ["accuracy", "vqa_accuracy"]


def test_folder_without_a_run(tmp_path):
  with pytest.raises(UserError, match=r"nowhere has no run"):
    evaluate(tmp_path / "nowhere")
  assert not (tmp_path / "nowhere").exists()


def test_run_without_a_checkpoint(workdir):
  shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(UserError, match=r"no checkpoint yet"):
    evaluate(workdir)


@pytest.mark.parametrize(
  ("flags", "line"),
  [
    (["--workdir=nowhere"], "--workdir=nowhere has no run"),
    (["--workdir=a", "--splt=test"], 'Did you mean "--split"?'),
    ([], "--workdir is required"),
  ],
)
def test_command_ends_in_one_line(tmp_path, flags, line):
  result = subprocess.run(
    [sys.executable, "-m", "narvl_jax.evaluate", *flags],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 2
  assert result.stdout == ""
  assert len(result.stderr.splitlines()) == 1
  assert result.stderr.startswith("error: ")
  assert line in result.stderr


@pytest.mark.parametrize(("given", "expected"), [(0, None), (5, 5), (None, 9)])
def test_a_limit_of_0_is_all_whatever_the_config_says(
  workdir, monkeypatch, given, expected
):
  def reached(*_, max_examples, **__):
    assert max_examples == expected
    raise KeyboardInterrupt

  _limit(workdir, 9)
  monkeypatch.setattr(evaluator, "evaluate_tasks", reached)
  with pytest.raises(KeyboardInterrupt):
    evaluate(workdir, Options(max_examples=given))


def test_command_prints_the_report_as_json_alone(workdir):
  result = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.evaluate", f"--workdir={workdir}"),
      *("--max_examples=2", "--tasks=vqa", "--json"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  report = json.loads(result.stdout)
  (path,) = (workdir / "evaluations").iterdir()
  assert report == json.loads(path.read_text())
  # For people.
  assert "vqa" in result.stderr
  assert f"wrote {path}" in result.stderr
