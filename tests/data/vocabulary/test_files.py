"""Vocabulary from the files of other programs, and what is wrong with them."""

import json
import multiprocessing
import pathlib
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from narvl_jax.data.vocabulary import files
from narvl_jax.data.vocabulary.vocabulary import (
  BLANK,
  MASK,
  SPECIALS,
  Vocabulary,
)
from narvl_jax.errors import UserError
from tests.support import replacements

_NAMES = ("dict.txt", "encoder.json", "vocab.bpe")


@pytest.fixture(scope="module")
def official(shared_files: pathlib.Path) -> Vocabulary:
  return _official(shared_files / "bpe")


@pytest.fixture(scope="module")
def reference(shared_files: pathlib.Path) -> dict:
  path = shared_files / "fixtures" / "text_pipeline.json"
  return json.loads(path.read_text())["dictionary"]


def _official(
  folder: pathlib.Path, num_codes: int = 8192, num_bins: int = 1000
) -> Vocabulary:
  paths = [folder / name for name in _NAMES]
  return Vocabulary.from_files("official", paths, num_codes, num_bins)


@pytest.mark.parametrize(
  ("symbol", "index"),
  [
    ("<s>", 0),
    ("<pad>", 1),
    ("</s>", 2),
    ("<unk>", 3),
    (".", 4),
    ("Ġthe", 5),
    ("<|endoftext|>", 50260),
    ("madeupword0000", 50261),
    ("madeupword0001", 50262),
    ("madeupword0002", 50263),
    ("<mask>", 50264),
    ("<code_0>", 50265),
    ("<code_8191>", 58456),
    ("<bin_0>", 58457),
    ("<bin_999>", 59456),
    ("<<BLANK>>", 59457),
  ],
)
def test_official_order(official: Vocabulary, symbol: str, index: int) -> None:
  assert official.symbol(index) == symbol


def test_official_numbers(official: Vocabulary, reference: dict) -> None:
  assert official.size == reference["size_with_blank"] == 59458
  assert official.blank_id == reference["blank"] == official.size - 1
  for name in ("bos", "pad", "eos", "unk"):
    assert getattr(official, f"{name}_id") == reference[name]
  index = reference["index"]
  assert official.mask_id == index[MASK]
  assert official.code_start == index["<code_0>"]
  assert official.num_codes == 8192
  assert official.bin_start == index["<bin_0>"]
  assert official.num_bins == 1000


def test_official_dictionary(
  official: Vocabulary, reference: dict, shared_files: pathlib.Path
) -> None:
  encoder = json.loads((shared_files / "bpe" / "encoder.json").read_text())

  def named(start: int, count: int) -> list[str]:
    names = (official.symbol(i) for i in range(start, start + count))
    return [str(encoder.get(name, name)) for name in names]

  assert named(0, 40) == reference["first_40"]
  around = reference["around_mask"]
  assert named(official.code_start + 5 - len(around), len(around)) == around
  assert named(official.size - 5, 5) == reference["last_5"]
  ids = {name: i for i, name in enumerate(named(0, official.size))}
  for name, index in reference["index"].items():
    assert ids.get(name, official.unk_id) == index


def test_official_fillers_vanish(official: Vocabulary) -> None:
  fillers = [50261, 50262, 50263]
  assert official.decode([4420, *fillers, 4420]) == " yes yes"
  assert official.forbidden[fillers].all()
  assert not official.forbidden[[4, 50260, 2, 58457, 59457]].any()


def test_reduced_dictionary(
  shared_files: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  said: list[str] = []
  monkeypatch.setattr(files, "warn", said.append)
  bpe = shared_files / "bpe"
  small = shared_files / "fixtures" / "micro_bpe" / "dict.txt"
  paths = (small, bpe / "encoder.json", bpe / "vocab.bpe")
  vocabulary = Vocabulary.from_files("official", paths, 16, 50)
  assert (vocabulary.size, vocabulary.blank_id) == (253, 252)
  # BPE knows the word, the dictionary does not.
  assert vocabulary.encode(" skateboards") == [vocabulary.unk_id] * 2
  assert len(said) == 1
  assert "has ids for 181 of the 50257 tokens of" in said[0]
  _official(bpe)
  assert len(said) == 1


# Where such files keep codes and bins: nowhere, some or all in vocab.json.
@pytest.mark.parametrize("extra", ["none", "some", "all"])
def test_huggingface_pair_equals_official(
  official: Vocabulary,
  shared_files: pathlib.Path,
  tmp_path: pathlib.Path,
  extra: str,
) -> None:
  base = [official.symbol(i) for i in range(4, official.mask_id)]
  after = {
    "none": [],
    "some": ["<code_0>", "<bin_12>"],
    "all": [
      *(official.symbol(i) for i in range(official.code_start, official.size))
    ],
  }[extra]
  assert extra != "all" or after[-1] == BLANK
  ids = {x: i for i, x in enumerate([*SPECIALS, *base, MASK, *after])}
  # The order of ids counts, not that of lines.
  vocab = tmp_path / "vocab.json"
  vocab.write_text(json.dumps(dict(sorted(ids.items()))))
  merges = shared_files / "bpe" / "vocab.bpe"
  pair = Vocabulary.from_files("huggingface", (vocab, merges))
  assert pair.fingerprint == official.fingerprint
  assert (pair.size, pair.blank_id) == (official.size, official.blank_id)
  np.testing.assert_array_equal(pair.forbidden, official.forbidden)
  for text in (
    " a red bus",
    " what color is the bus?",
    "日本 <bin_3> snow-ball",
  ):
    assert pair.encode(text) == official.encode(text)
    assert pair.decode(pair.encode(text)) == text


def _encoded(vocabulary: Vocabulary) -> tuple[int, list[int]]:
  return len(vocabulary._cache), vocabulary.encode(" a red bus")


def test_in_a_worker_process(official: Vocabulary) -> None:
  expected = official.encode(" a red bus")
  # Texts seen so far stay here.
  before = len(pickle.dumps(official))
  for i in range(500):
    official.encode(f" a text that is number {i}")
  assert len(pickle.dumps(official)) == before
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(_encoded, (official,)) == (0, expected)


# Files that are wrong. Made here: 256 tokens, joined to 200 pairs.


def _made_files(folder: pathlib.Path) -> None:
  letters = [chr(0x4E00 + i) for i in range(256)]
  pairs = [(letters[i], letters[i + 1]) for i in range(200)]
  tokens = [*letters, *("".join(pair) for pair in pairs)]
  encoder = {token: i for i, token in enumerate(tokens)}
  (folder / "encoder.json").write_text(json.dumps(encoder))
  lines = [f"{i} 1\n" for i in range(len(tokens))]
  (folder / "dict.txt").write_text("".join(lines))
  merges = [f"{left} {right}\n" for left, right in pairs]
  (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(merges))
  vocab = {"<s>": 0, "<mask>": 1}
  vocab |= {token: i + 2 for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocab))


def test_generated_files_are_valid(tmp_path: pathlib.Path) -> None:
  _made_files(tmp_path)
  size = 4 + 456 + 1 + 2 + 3 + 1
  assert _official(tmp_path, 2, 3).size == size
  paths = (tmp_path / "vocab.json", tmp_path / "vocab.bpe")
  pair = Vocabulary.from_files("huggingface", paths, 2, 3)
  assert pair.size == size
  assert pair.fingerprint == _official(tmp_path, 2, 3).fingerprint


def _swapped(first: str, second: str) -> Callable[[pathlib.Path], None]:
  def swap(folder: pathlib.Path) -> None:
    a, b = ((folder / name).read_bytes() for name in (first, second))
    (folder / first).write_bytes(b)
    (folder / second).write_bytes(a)

  return swap


def _cut(name: str, count: int) -> Callable[..., None]:
  def cut(folder: pathlib.Path) -> None:
    text = (folder / name).read_text()
    (folder / name).write_text(text[:-count])

  return cut


def _replaced(name: str, old: str, new: str) -> Callable[..., None]:
  def replace(folder: pathlib.Path) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))

  return replace


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_swapped("dict.txt", "encoder.json"), r"encoder\.json is not JSON"),
    (
      _swapped("dict.txt", "vocab.bpe"),
      r'dict\.txt line 1 is "#version: 0\.2", not "SYMBOL COUNT"; .*'
      r"--config\.vocabulary\.path",
    ),
    (_swapped("encoder.json", "vocab.bpe"), r"encoder\.json is not JSON"),
    (
      _swapped("encoder.json", "vocab.json"),
      r"is a vocab\.json and no .*--config\.vocabulary\.source=huggingface",
    ),
    (_cut("encoder.json", 100), r"encoder\.json is not JSON"),
    (_cut("dict.txt", 1), r"dict\.txt ends in the middle of line 456"),
    (_cut("dict.txt", 3), r'dict\.txt line 456 is "455"'),
    (
      _cut("vocab.bpe", 4 * 50),
      r"vocab\.bpe has 150 merges, which make only 150 of the 200 .*copy it",
    ),
    (_replaced("dict.txt", "7 1", "6 1"), 'line 8 lists "6" a second time'),
    (
      _replaced("encoder.json", ": 3", ': "3"'),
      "has '3' for .* not the number",
    ),
    (_replaced("vocab.bpe", "\n", "\na b c\n"), 'line 2 is "a b c", not two'),
    (_replaced("vocab.bpe", "\n", "\na b\n"), "does not fit its vocabulary"),
  ],
)
def test_bad_official_files(
  tmp_path: pathlib.Path, damage: Callable[..., None], message: str
) -> None:
  _made_files(tmp_path)
  damage(tmp_path)
  with pytest.raises(UserError, match=message):
    _official(tmp_path, 2, 3)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (_swapped("vocab.json", "vocab.bpe"), r"vocab\.json is not JSON"),
    (_cut("vocab.bpe", 4 * 3), r"it is cut off or of another tokenizer"),
    (_cut("vocab.json", 100), r"vocab\.json is not JSON"),
  ],
)
def test_bad_huggingface_files(
  tmp_path: pathlib.Path, damage: Callable[..., None], message: str
) -> None:
  _made_files(tmp_path)
  damage(tmp_path)
  with pytest.raises(UserError, match=message):
    Vocabulary.from_files(
      "huggingface", (tmp_path / "vocab.json", tmp_path / "vocab.bpe"), 2, 3
    )


@pytest.mark.parametrize("name", _NAMES)
def test_missing_file(tmp_path: pathlib.Path, name: str) -> None:
  _made_files(tmp_path)
  (tmp_path / name).unlink()
  message = rf"cannot read .*{name}.*No such file.*--config.vocabulary.path"
  with pytest.raises(UserError, match=message):
    _official(tmp_path, 2, 3)


@pytest.mark.parametrize(
  "kind", ["folder", "pipe", "socket", "endless link", "huge", "number"]
)
def test_only_regular_files_are_read(tmp_path: pathlib.Path, kind: str) -> None:
  path = tmp_path / "vocab.json"
  replacements.replace(path, kind)
  with pytest.raises(UserError, match=r"vocab\.json"):
    files.read_json_object(path)
