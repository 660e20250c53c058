"""`python -m narvl_jax.document_frequencies`: sources, the file, mistakes."""

import base64
import io
import json
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from narvl_jax import document_frequencies as command
from narvl_jax.document_frequencies import document_frequencies
from narvl_jax.errors import UserError
from narvl_jax.metrics import tokenizers
from narvl_jax.metrics.captions import simple_cider
from narvl_jax.metrics.cider import DocumentFrequencies

_CAPTIONS = {7: ["A red dog.", "A dog!"], 9: ["A cat."]}


def _coco(folder):
  path = folder / "captions.json"
  rows = [
    {"image_id": i, "caption": x} for i, v in _CAPTIONS.items() for x in v
  ]
  # Captions of one picture need not be neighbours.
  path.write_text(json.dumps({"annotations": rows[::-1], "images": []}))
  return path


def test_a_coco_file(tmp_path):
  to = tmp_path / "df.tsv.gz"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "narvl_jax.document_frequencies"),
      *(str(_coco(tmp_path)), f"--to={to}", "--tokenizer=simple"),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  found = DocumentFrequencies.load(to)
  assert (found.documents, found.tokenizer) == (2, "simple")
  assert found.counts == {
    **{"a": 2, "dog": 1, "a red dog": 1, "red dog": 1, "a red": 1, "red": 1},
    **{"a dog": 1, "cat": 1, "a cat": 1},
  }
  assert "2 pictures, 3 captions, 9 n-grams of 1 to 4 words" in done.stdout
  assert f"--cider_df={to}" in done.stdout
  # On the corpus itself the file changes nothing.
  texts = (["a red cat", "a cat"], list(_CAPTIONS.values()))
  assert simple_cider(*texts, found).value == simple_cider(*texts).value


def test_rows_of_one_picture_are_united(tmp_path):
  pictures = []
  for colour in ("red", "blue"):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    pictures.append(base64.b64encode(file.getvalue()).decode())
  rows = [("1", "a red dog", 0), ("2", "a cat", 1), ("3", "a dog", 0)]
  path = tmp_path / "train.tsv"
  path.write_text(
    "".join(f"{i}\t{i}\t{x}\t\t{pictures[p]}\n" for i, x, p in rows)
  )
  options: Any = {"tokenizer": "simple"}
  found = document_frequencies(str(path), str(tmp_path / "df.tsv"), **options)
  assert found.documents == 2
  assert (found.counts["a"], found.counts["dog"]) == (2, 1)
  assert DocumentFrequencies.load(tmp_path / "df.tsv") == found
  some = document_frequencies(
    str(path), str(tmp_path / "df.tsv"), max_examples=1, **options
  )
  assert some.documents == 1


def test_the_tokenizer(tmp_path, monkeypatch, capsys):
  path, to = str(_coco(tmp_path)), str(tmp_path / "df.tsv")
  monkeypatch.setattr(tokenizers, "why_no_ptb", lambda: "there is no Java")
  assert document_frequencies(path, to).tokenizer == "simple"
  assert (
    "note: --tokenizer=simple, since there is no ptb (there is no Java)"
    in (capsys.readouterr().err)
  )
  with pytest.raises(UserError, match="--tokenizer=ptb: there is no Java; or"):
    document_frequencies(path, to, tokenizer="ptb")
  monkeypatch.setattr(tokenizers, "why_no_ptb", lambda: "")
  monkeypatch.setattr(tokenizers, "ptb", tokenizers.simple)
  assert document_frequencies(path, to).tokenizer == "ptb"
  assert f"--metrics=all --cider_df={to}" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", r"not a file of COCO captions .*annotations.*JSONDecodeError"),
    ("[]", "not a file of COCO captions"),
    ('{"annotations": [{"image_id": 1}]}', "KeyError: 'caption'"),
    (
      '{"annotations": [{"image_id": 1, "caption": 2}]}',
      "caption is not a text",
    ),
    ('{"annotations": []}', "has no captions"),
  ],
)
def test_bad_coco_files(tmp_path, content, message):
  path = tmp_path / "captions.json"
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    document_frequencies(str(path), "df.tsv", tokenizer="simple")


def test_mistakes(tmp_path, monkeypatch):
  path = str(_coco(tmp_path))
  options: Any = {"tokenizer": "simple"}
  with pytest.raises(UserError, match="No such file"):
    document_frequencies(str(tmp_path / "none.json"), "df.tsv", **options)
  with pytest.raises(UserError, match="is read whole; leave out --split"):
    document_frequencies(path, "df.tsv", split="train", **options)
  with pytest.raises(UserError, match="too many to read; set --max_examples"):
    document_frequencies("shapes", "df.tsv", **options)
  for to, message in (
    (None, r"--to=FILE\.tsv\.gz is missing"),
    ("df.pkl", r'--to="df.pkl" must be a file \*\.tsv\.gz or \*\.tsv'),
    (str(tmp_path / "no" / "df.tsv"), "create it first"),
  ):
    given = type("Flags", (), {"to": to})
    monkeypatch.setattr(command.flags, "FLAGS", given)
    with pytest.raises(UserError, match=message):
      command.main(["document_frequencies", path])
