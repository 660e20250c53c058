"""Vocabulary: order of ids, the three sources, decoding, saving."""

import json
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narvl_jax.data.vocabulary import vocabulary as vocabulary_module
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError

COLORS = ["red", "green", "blue"]
SHAPES = ["circle", "square", "triangle"]
WORDS = [*COLORS, *SHAPES, "left", "above", "what", "is", "the"]
TEXTS = [f" {a} {b}?" for a in WORDS for b in WORDS] + [" Yes", " no"] * 3


@pytest.fixture(scope="module")
def official(shared_files: pathlib.Path) -> Vocabulary:
  return _official(shared_files)


@pytest.fixture(scope="module")
def reference(shared_files: pathlib.Path) -> dict:
  path = shared_files / "fixtures" / "text_pipeline.json"
  return json.loads(path.read_text())


@pytest.fixture(scope="module")
def trained() -> Vocabulary:
  return Vocabulary.train(TEXTS, 200, num_codes=3, num_bins=5)


def _official(shared: pathlib.Path) -> Vocabulary:
  folder = shared / "bpe"
  names = ("dict.txt", "encoder.json", "vocab.bpe")
  return Vocabulary.from_files("official", [folder / name for name in names])


@pytest.mark.parametrize(
  ("text", "ids"),
  [
    (" what does the image describe?", "99 473 5 2274 6190 116"),
    (
      ' which region does the text " a man in red " describe?',
      "61 976 473 5 2788 22 10 313 11 1275 22 6190 116",
    ),
    (
      ' can image and text1 " two dogs run " imply text2 " animals outside "?',
      "64 2274 8 2788 134 22 80 3678 422 22 25696 2788 176 22 3122 751 22 116",
    ),
    (" what color is the bus?", "99 3195 16 5 2353 116"),
    (" object: bus tree sky", "7626 35 2353 3907 6360"),
    (" yes", "4420"),
    (" no", "117"),
    (" maybe", "2085"),
    (" two men play skateboards", "80 604 310 12800 15659"),
  ],
)
def test_official_examples(official: Vocabulary, text: str, ids: str) -> None:
  assert official.encode(text) == [int(i) for i in ids.split()]
  assert official.decode(official.encode(text)) == text


def test_official_texts(official: Vocabulary, reference: dict) -> None:
  assert len(reference["bpe"]) > 20
  for row in reference["bpe"]:
    assert official.encode(row["text"]) == row["ids"]
    assert official.decode(row["ids"]) == row["decoded"]


def test_trained_order(trained: Vocabulary) -> None:
  base = trained.mask_id - 4
  assert trained.size == 4 + base + 1 + 3 + 5 + 1 <= 200
  assert trained.code_start == trained.mask_id + 1
  assert trained.bin_start == trained.code_start + 3
  assert trained.blank_id == trained.bin_start + 5 == trained.size - 1
  names = [trained.symbol(i) for i in range(trained.size)]
  assert names[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
  assert names[trained.mask_id :] == [
    "<mask>",
    *(f"<code_{i}>" for i in range(3)),
    *(f"<bin_{i}>" for i in range(5)),
    "<<BLANK>>",
  ]
  forbidden = [0, 1, 3, *range(trained.mask_id, trained.bin_start)]
  assert np.flatnonzero(trained.forbidden).tolist() == forbidden


def test_trained_words_are_whole(trained: Vocabulary) -> None:
  for word in [*WORDS, "Yes", "no"]:
    assert len(trained.encode(" " + word)) == 1, word
  # No id is spent on what merging passes through: letters, words, "?", " ".
  letters = set("".join(WORDS) + "Yesno? ")
  assert trained.mask_id - 4 == len(letters) + len(WORDS) + 2


def test_trained_splits_what_it_has_not_seen(trained: Vocabulary) -> None:
  assert (
    trained.decode(trained.encode(" redder coherent")) == " redder coherent"
  )
  ids = trained.encode(" red Z日本 blue")
  assert ids.count(trained.unk_id) == 1
  assert trained.decode(ids) == " red <unk> blue"


def test_trained_does_not_read_symbols_in_text() -> None:
  vocabulary = Vocabulary.train([" <unk> <bin_0>"] * 2, 100, num_bins=2)
  ids = vocabulary.encode(" <unk><bin_0>")
  assert all(4 <= i < vocabulary.mask_id for i in ids)


def test_trained_keeps_the_most_frequent_within_its_size() -> None:
  texts = [" often"] * 9 + [" seldom"] * 3
  characters = len(set(" oftenseldom"))
  size = 4 + characters + 1 + 1 + 2 + 1
  vocabulary = Vocabulary.train(texts, size, num_bins=2)
  assert vocabulary.size == size
  assert len(vocabulary.encode(" often")) == 1
  assert len(vocabulary.encode(" seldom")) == len(" seldom")
  assert vocabulary.decode(vocabulary.encode(" seldom")) == " seldom"


def test_trained_is_deterministic(trained: Vocabulary) -> None:
  again = Vocabulary.train(reversed(TEXTS), 200, num_codes=3, num_bins=5)
  assert again.fingerprint == trained.fingerprint
  other = Vocabulary.train(TEXTS, 200, num_codes=3, num_bins=6)
  assert other.fingerprint != trained.fingerprint


def test_trained_too_small() -> None:
  letters = len(set("".join(TEXTS)))
  least = 4 + letters + 1 + 5 + 1
  with pytest.raises(UserError, match=rf"vocabulary\.size={least} or more"):
    Vocabulary.train(TEXTS, least - 1, num_bins=5)
  assert Vocabulary.train(TEXTS, least, num_bins=5).size == least
  with pytest.raises(UserError, match="no text to train"):
    Vocabulary.train([], 100)
  with pytest.raises(UserError, match="num_bins is -1"):
    Vocabulary.train(TEXTS, 100, num_bins=-1)


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet=sorted(set("".join(TEXTS))), max_size=30))
def test_round_trip(text: str) -> None:
  vocabulary = _small()
  ids = vocabulary.encode(text)
  assert all(3 < i < vocabulary.mask_id for i in ids)
  assert vocabulary.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=20), st.lists(st.integers(-5, 400), max_size=20))
def test_anything_goes(text: str, ids: list[int]) -> None:
  vocabulary = _small()
  assert all(3 <= i < vocabulary.mask_id for i in vocabulary.encode(text))
  assert isinstance(vocabulary.decode(ids), str)


_SMALL: list[Vocabulary] = []


def _small() -> Vocabulary:
  # Not a fixture: hypothesis calls a test many times.
  if not _SMALL:
    _SMALL.append(Vocabulary.train(TEXTS, 200, num_bins=5))
  return _SMALL[0]


def test_decode_symbols(trained: Vocabulary) -> None:
  red = trained.encode(" red")
  bins = [trained.bin_start, trained.bin_start + 4]
  silent = [0, 1, 2, trained.blank_id, -1, trained.size, 10**6]
  assert trained.decode([*silent, *red, *silent]) == " red"
  assert trained.decode([*red, *bins]) == " red<bin_0><bin_4>"
  assert trained.decode([trained.mask_id, 3, trained.code_start]) == (
    "<mask><unk><code_0>"
  )


def test_decode_half_a_character(official: Vocabulary) -> None:
  ids = official.encode("日本")
  assert official.decode(ids) == "日本"
  assert "\ufffd" in official.decode(ids[1:2])


def test_encode_returns_a_new_list(trained: Vocabulary) -> None:
  first = trained.encode(" red circle")
  first.append(0)
  assert trained.encode(" red circle") == first[:-1]


def test_cache_is_used_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(vocabulary_module, "_CACHE_SIZE", 4)
  vocabulary = Vocabulary.train(TEXTS, 200, num_bins=5)
  for text in TEXTS[:9]:
    vocabulary.encode(text)
    assert 1 <= len(vocabulary._cache) <= 4
  vocabulary._cache[" red"] = [7, 7]
  assert vocabulary.encode(" red") == [7, 7]


def test_save_and_load(trained: Vocabulary, tmp_path: pathlib.Path) -> None:
  trained.save(tmp_path / "new" / "vocabulary")
  loaded = Vocabulary.load(tmp_path / "new" / "vocabulary")
  assert loaded.fingerprint == trained.fingerprint
  assert loaded.size == trained.size
  for text in (" red circle?", " redder Z coherent"):
    assert loaded.encode(text) == trained.encode(text)
  assert sorted(p.name for p in (tmp_path / "new/vocabulary").iterdir()) == [
    "tokenizer.json",
    "vocabulary.json",
  ]


def test_official_survives_saving(
  official: Vocabulary, tmp_path: pathlib.Path
) -> None:
  official.save(tmp_path)
  loaded = Vocabulary.load(tmp_path)
  assert loaded.encode(" two men") == [80, 604]
  assert loaded.fingerprint == official.fingerprint


def test_pickle(trained: Vocabulary) -> None:
  copy = pickle.loads(pickle.dumps(trained))
  assert copy.fingerprint == trained.fingerprint
  assert copy.encode(" redder") == trained.encode(" redder")


def test_load_rejects_changed_files(
  trained: Vocabulary, tmp_path: pathlib.Path
) -> None:
  trained.save(tmp_path)
  path = tmp_path / "vocabulary.json"
  content = json.loads(path.read_text())
  content["num_bins"] += 1
  path.write_text(json.dumps(content))
  with pytest.raises(UserError, match="was changed after it was saved"):
    Vocabulary.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match="has no vocabulary of this program"):
    Vocabulary.load(tmp_path)
  path.write_text("{")
  with pytest.raises(UserError, match="is not JSON"):
    Vocabulary.load(tmp_path)
  path.write_text("[]")
  with pytest.raises(UserError, match="contains a list, not a JSON object"):
    Vocabulary.load(tmp_path)
  path.unlink()
  with pytest.raises(UserError, match="cannot read the vocabulary file"):
    Vocabulary.load(tmp_path)


def test_words_unknown_to_a_trained_vocabulary():
  texts = [" a red circle", " how many circles are there?"] * 50
  vocabulary = Vocabulary.train(texts, 400, num_bins=8)

  def unknown(text: str, whole: bool = True) -> list[str]:
    return vocabulary.unknown_words(text, whole=whole)

  assert unknown(" how many red circles are there?") == []
  # In pieces, which the words that it was made from are not.
  assert unknown(" a redder circle") == ["redder"]
  # Without a token, or letter by letter: surely unknown.
  assert unknown(" a red xylophone 字", whole=False) == ["xylophone", "字"]
  assert unknown(" thea", whole=False) == ["thea"]
  assert unknown("") == []
