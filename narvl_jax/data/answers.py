"""Closed lists of answers: read from files or collected from data sets."""

import collections
import json
import os
import pathlib
import pickle
from collections.abc import Sequence
from typing import Any

from narvl_jax.data.answer_text import checked_text, normalize_answer
from narvl_jax.data.batches.bad_records import read_good
from narvl_jax.data.example import Record
from narvl_jax.data.renamed import run_renamed
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path

# The setting that names the file of a list.
ANSWERS_SETTING = "--config.tasks.vqa.answers"
_FLAG = f"{ANSWERS_SETTING}, or --answers"
# Tasks whose answers may form a closed list that depends on the data.
_TASKS = ("vqa",)


def load_answers(path: str | os.PathLike[str]) -> list[str]:
  """Returns the normalised answers of a list, in the order of the file.

  Args:
    path: a text file with an answer per line; a JSON list, or an object whose
      keys are the answers; or the reference's `trainval_ans2label.pkl`, a
      pickle of such an object. Code in a pickle is never run.

  Raises:
    UserError: the file cannot be read, or has an empty or a repeated entry.
  """
  path = as_path(path)
  readers = {".json": _read_json, ".pkl": _read_pickle, ".txt": _read_lines}
  if path.suffix not in readers:
    raise UserError(
      f'the list of answers "{path}" ends in "{path.suffix}"; it must be a'
      f" .txt with an answer a line, a .json or a .pkl ({_FLAG})"
    )
  try:
    entries = readers[path.suffix](path)
  except OSError as e:
    raise UserError(
      f'cannot read the list of answers "{path}": {e.strerror or e} ({_FLAG})'
    ) from e
  except UnicodeDecodeError as e:
    raise UserError(
      f'the list of answers "{path}" is not UTF-8: {e} ({_FLAG})'
    ) from e
  return _check(entries, path)


def _read_lines(path: pathlib.Path) -> list[Any]:
  text = path.read_text(encoding="utf-8")
  return text.removesuffix("\n").split("\n") if text else []


def _read_json(path: pathlib.Path) -> list[Any]:
  try:
    return _entries(json.loads(path.read_text(encoding="utf-8")), path)
  except json.JSONDecodeError as e:
    raise UserError(
      f'the list of answers "{path}" is not JSON: {e} ({_FLAG})'
    ) from e


class _PlainUnpickler(pickle.Unpickler):
  """Builds only dicts, lists, texts and numbers; imports and calls nothing."""

  def find_class(self, module_name: str, global_name: str, /) -> Any:
    """Rejects all names: a pickle can run code only through a name."""
    raise pickle.UnpicklingError(
      f"it asks for {module_name}.{global_name}, which could run code"
    )


def _read_pickle(path: pathlib.Path) -> list[Any]:
  with path.open("rb") as file:
    try:
      content = _PlainUnpickler(file).load()
    except OSError:
      raise
    except Exception as e:  # A damaged pickle can raise nearly anything.
      raise UserError(
        f'the list of answers "{path}" is rejected: {e or "it is damaged"}; it'
        " must be a pickle of a dict or list of texts, or write it as JSON"
        f" ({_FLAG})"
      ) from e
  return _entries(content, path)


def _entries(content: Any, path: pathlib.Path) -> list[Any]:
  if not isinstance(content, dict | list):
    raise UserError(
      f'the list of answers "{path}" contains a {type(content).__name__}; it'
      f" must be a list of answers or an object whose keys they are ({_FLAG})"
    )
  return list(content)


def _check(entries: Sequence[Any], path: pathlib.Path) -> list[str]:
  """Returns the normalised answers; messages count entries from 1."""
  places: dict[str, int] = {}
  for number, entry in enumerate(entries, 1):
    where = f'entry {number} of the list of answers "{path}"'
    if not isinstance(entry, str):
      raise UserError(f"{where} is {entry!r}, not a text ({_FLAG})")
    answer = normalize_answer(entry)
    if not answer:
      raise UserError(f"{where} is empty; remove it ({_FLAG})")
    if answer in places:
      raise UserError(
        f'{where}, "{answer}", is also entry {places[answer]}; remove one'
        f" ({_FLAG})"
      )
    places[answer] = number
  if not places:
    raise UserError(f'the list of answers "{path}" is empty ({_FLAG})')
  return list(places)


def encode_answers(
  answers: Sequence[str], vocabulary: Vocabulary, *, eos: bool
) -> list[list[int]]:
  """Returns the token ids of answers, as in targets, with eos if `eos` is set.

  Raises:
    UserError: an answer is empty or has characters that the vocabulary lacks.
  """
  end = [vocabulary.eos_id] if eos else []
  encoded = []
  for number, answer in enumerate(answers, 1):
    ids = vocabulary.encode(" " + answer)
    if not ids or not answer.strip() or vocabulary.unk_id in ids:
      problem = (
        "no text" if not answer.strip() else "characters without a token"
      )
      raise UserError(
        f'answer {number}, "{answer}" (its line in the list), cannot be'
        f" tokenised: it has {problem} in this vocabulary of"
        f" {vocabulary.size:,} ids; remove it or use the list of another data"
        f" set ({_FLAG})"
      )
    encoded.append(ids + end)
  return encoded


def collect_answers(
  source: Sequence[Record], task: str, *, max_examples: int = 0
) -> dict[str, int]:
  """Returns answer -> records in which it is valid, the most frequent first.

  Args:
    source: records; bad ones are skipped with a warning.
    max_examples: number of records to read, from the first; 0 reads all.

  Raises:
    UserError: the answers of the task do not form a list, there are none, or
      the source is endless.
  """
  if task not in _TASKS:
    raise UserError(
      f'the answers of task "{task}" are not collected in a list: those of'
      " entailment and grounding are known, captions are free; nearest:"
      f" --task={_TASKS[0]}"
    )
  counts: collections.Counter[str] = collections.Counter()
  for answers in read_good(
    source, task, _answers, "collecting answers", max_examples
  ):
    counts.update(answers)
  if not counts:
    raise UserError(
      f"none of the {len(source):,} records has an answer; choose a split whose"
      " truth is known (--split)"
    )
  return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _answers(record: Record) -> set[str]:
  answers = {normalize_answer(checked_text(x)) for x in record.answers}
  return answers - {""}


if __name__ == "__main__":
  run_renamed("data.answers", "list_answers")
