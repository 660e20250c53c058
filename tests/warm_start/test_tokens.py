"""Tokens of one vocabulary found in another."""

import tokenizers

from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.warm_start.tokens import match_tokens, same_ids

TEXTS = [" a red circle", " a blue square", " two red squares"]


def make(texts: list[str], *, size: int = 80, num_bins: int = 5) -> Vocabulary:
  return Vocabulary.train(texts * 3, size, num_codes=2, num_bins=num_bins)


def test_tokens_are_found_by_their_names() -> None:
  theirs = make(TEXTS)
  ours = make([" a green circle", " a red dog"], num_bins=5)
  classes = theirs.size, ours.size
  found = match_tokens(theirs, ours, classes=classes, rows=ours.size + 3)
  assert found.rows.shape == (ours.size + 3,)
  assert (found.rows[ours.size :] == -1).all()
  symbols = {theirs.symbol(i) for i in range(theirs.size)}
  for i in range(ours.size):
    if found.rows[i] < 0:
      assert ours.symbol(i) not in symbols
    else:
      assert theirs.symbol(found.rows[i]) == ours.symbol(i)
  assert set(found.missing) == {
    ours.symbol(i) for i in range(ours.size) if ours.symbol(i) not in symbols
  }
  assert "Ġgreen" in found.missing
  assert found.rows[ours.blank_id] == theirs.blank_id != ours.blank_id
  count = ours.size - len(found.missing)
  assert found.note().startswith(
    f"{count} of {ours.size} tokens were found there by name,"
    f" {len(found.missing)} start fresh ("
  )


def test_a_word_is_no_symbol_of_the_same_name() -> None:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  theirs = Vocabulary(tokenizer, ["<mask>", "a"], num_codes=0, num_bins=0)
  ours = Vocabulary(tokenizer, ["a"], num_codes=0, num_bins=0)
  found = match_tokens(
    theirs, ours, classes=(theirs.size, ours.size), rows=ours.size
  )
  assert found.rows[ours.mask_id] == theirs.mask_id
  found = match_tokens(
    ours, theirs, classes=(ours.size, theirs.size), rows=theirs.size
  )
  assert found.rows.tolist() == [0, 1, 2, 3, -1, 4, 5, 6]


def test_bins_are_found_by_their_places() -> None:
  theirs, ours = make(TEXTS, num_bins=5), make(TEXTS, num_bins=9)
  found = match_tokens(
    theirs, ours, classes=(theirs.size, ours.size), rows=ours.size
  )
  bins = found.rows[ours.bin_start : ours.blank_id] - theirs.bin_start
  # Ties are rounded to even.
  assert bins.tolist() == [0, 0, 1, 2, 2, 2, 3, 4, 4]
  assert not found.missing
  assert found.note().endswith(
    "each coordinate bin is the nearest of the 5 there"
  )
  none = make(TEXTS, num_bins=0)
  found = match_tokens(
    none, ours, classes=(none.size, ours.size), rows=ours.size
  )
  assert len(found.missing) == 9
  assert found.missing[0] == "<bin_0>"


def test_the_blank_is_no_class_of_an_autoregressive_model() -> None:
  words = make(TEXTS)
  found = match_tokens(
    words, words, classes=(words.size - 1, words.size), rows=words.size
  )
  assert found.rows.tolist() == [*range(words.size - 1), -1]
  assert found.missing == (words.symbol(words.blank_id),)
  found = match_tokens(
    words, words, classes=(words.size, words.size - 1), rows=words.size
  )
  assert not found.missing
  assert found.rows[words.blank_id] == -1


def test_rows_of_the_same_vocabulary() -> None:
  assert same_ids(5, 3).tolist() == [0, 1, 2, -1, -1]
