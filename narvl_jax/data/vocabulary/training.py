"""Byte-level BPE: GPT-2's tokenizer, and a small one learned from texts."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from narvl_jax.errors import UserError

_UNK = "<unk>"
# Bytes of the longest word, or of a sentence in a script without spaces.
_LONGEST_WORD = 5000


def byte_level(
  vocab: Mapping[str, int],
  merges: Sequence[tuple[str, str]],
  unk_token: str | None = None,
) -> tokenizers.Tokenizer:
  """Returns a byte-level BPE tokenizer with GPT-2's pre-tokenisation.

  Args:
    vocab: token -> id of the tokenizer.
    merges: pairs of tokens in the order of their priority.
    unk_token: replaces a run of characters outside `vocab`; None drops them.
  """
  model = models.BPE(
    vocab=dict(vocab),
    merges=list(merges),
    unk_token=unk_token,
    fuse_unk=unk_token is not None,
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = _pre_tokenizer()
  return tokenizer


def train_bpe(
  texts: Iterable[str], *, budget: int, fixed: int
) -> tuple[tokenizers.Tokenizer, list[str], dict[str, tuple[str, str]]]:
  """Learns merges from `texts` and picks the tokens that get an id.

  Args:
    texts: texts with their leading space.
    budget: largest number of tokens with an id.
    fixed: number of other ids, for the error message.

  Returns:
    The tokenizer; the picked tokens in the order of their ids (characters,
    then tokens by falling frequency); the two parts of every merged token.

  Raises:
    UserError: `budget` is smaller than the number of characters.
  """
  pre_tokenizer = _pre_tokenizer()
  words: collections.Counter[str] = collections.Counter()
  for text, count in collections.Counter(texts).items():
    for word, _ in pre_tokenizer.pre_tokenize_str(text):
      words[word] += count
  if not words:
    raise UserError(
      "there is no text to train the vocabulary on; check --config.data.train"
    )
  alphabet = sorted(set().union(*words))
  if budget < len(alphabet):
    raise UserError(
      f"a vocabulary of {fixed + budget} ids is too small: the data needs"
      f" {fixed} for specials, codes and bins and {len(alphabet)} for"
      f" characters; set --config.vocabulary.size={fixed + len(alphabet)}"
      " or more"
    )
  for word in [word for word in words if len(word) > _LONGEST_WORD]:
    # The time to learn from a word grows with the square of its length.
    del words[word]
  learner = _learn_merges(words, alphabet, budget)
  used: collections.Counter[str] = collections.Counter()
  for word, count in words.items():
    for token in learner.encode(word).tokens:
      used[token] += count
  model = json.loads(learner.to_str())["model"]
  merges = [(left, right) for left, right in model["merges"]]
  parts: dict[str, tuple[str, str]] = {}
  for left, right in merges:
    # Two merges can make the same token; either splits it.
    parts.setdefault(left + right, (left, right))
  picked = sorted(
    (token for token in used if token in parts),
    key=lambda token: (-used[token], token),
  )
  tokenizer = byte_level(model["vocab"], merges, unk_token=_UNK)
  return tokenizer, alphabet + picked[: budget - len(alphabet)], parts


def _learn_merges(
  words: Mapping[str, int], alphabet: Sequence[str], budget: int
) -> tokenizers.Tokenizer:
  """Merges until each frequent word is one token, within a limit."""
  to_whole_words = sum(len(word) - 1 for word in words)
  merges = min(to_whole_words, 4 * budget + 2000)
  learner = tokenizers.Tokenizer(models.BPE(unk_token=_UNK))
  # The words are pre-tokenised; no merge may cross them.
  learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  trainer = trainers.BpeTrainer(
    vocab_size=len(alphabet) + 1 + merges,
    min_frequency=2,
    special_tokens=[_UNK],
    initial_alphabet=list(alphabet),
    show_progress=False,
  )
  repeated = (word for word, n in sorted(words.items()) for _ in range(n))
  learner.train_from_iterator(repeated, trainer)
  return learner


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
