"""Visual question answering: from a picture and a question to an answer."""

import dataclasses
from collections.abc import Sequence

from narvl_jax.data.answer_text import normalize_answer
from narvl_jax.data.answers import encode_answers, load_answers
from narvl_jax.data.example import Record
from narvl_jax.data.tasks import augmented, base
from narvl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class VqaSettings(augmented.AugmentedSettings):
  """Settings of question answering.

  Attributes:
    prompt: template for the question.
    max_source_words: longer questions are cut; 0: no limit.
    max_target_words: longer answers are cut; 0: no limit.
    add_object: append the names of detected objects, unless `objects` of the
      record is None.
    object_prompt: template for the names.
    max_objects: further names are dropped; 0: no limit.
    answers: file of all answers that constrained decoding allows; see
      `narvl_jax.data.answers`.
  """

  decoder_prompt: bool = True
  prompt: str = "{}"
  max_source_words: int = 80
  max_target_words: int = 0
  add_object: bool = True
  object_prompt: str = "object: {}"
  max_objects: int = 30
  answers: str = dataclasses.field(default="", metadata={"path": True})


class VqaTask(augmented.AugmentedTask[VqaSettings]):
  """Question and object names; the target is the best-scored answer."""

  name = "vqa"
  open_ended = False
  settings_class = VqaSettings

  def decode(self, ids: Sequence[int], original_size: tuple[int, int]) -> str:
    """Returns the answer."""
    del original_size
    return normalize_answer(self.vocabulary.decode(ids))

  def answer_space(self) -> base.AnswerSpace:
    """See `Task`: the answers of a file, shortened as targets are."""
    path = self.settings.answers
    if not path:
      raise UserError(
        "there is no list of the answers that vqa allows; write one by python"
        " -m narvl_jax.list_answers SPEC --to=answers.txt, and set"
        " --config.tasks.vqa.answers=answers.txt in training or, for a trained"
        " run, --answers=answers.txt"
      )
    # Answers that are cut may become equal.
    texts = dict.fromkeys(map(self._target_text, load_answers(path)))
    encoded = encode_answers(list(texts), self.vocabulary, eos=False)
    return base.AnswerSpace(sequences=tuple(map(tuple, encoded)))

  def source_texts(self, record: Record) -> list[str]:
    """See `Task`."""
    settings = self.settings
    question = base.clean_question(record.prompt, settings.max_source_words)
    self._require_prompt(question, record)
    if not question.endswith("?"):
      question += "?"
    texts = [" " + settings.prompt.format(question)]
    if settings.add_object and record.objects is not None:
      names = " ".join(record.objects[: settings.max_objects or None])
      texts.append(" " + settings.object_prompt.format(names))
    return texts

  def _target_texts(self, record: Record) -> list[str]:
    return [" " + self._target_text(answer) for answer in record.answers]

  def _target(self, record: Record) -> tuple[list[int], float]:
    answer, confidence = self._best_answer(record)
    text = self._target_text(answer)
    self._require_target(text.strip(), answer, record)
    return self.vocabulary.encode(" " + text), confidence

  def _target_text(self, answer: str) -> str:
    text = normalize_answer(answer)
    return base.limit_words(text, self.settings.max_target_words)
