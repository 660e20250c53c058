"""The autoregressive teacher of a distilled student.

`config.distillation.teacher` names the folder of its run. Its distribution at
each label, given the labels before, is a target of the queries that emit that
label (`training.objective.DistillationLoss`). Its weights are read at every
start and are not part of the student's checkpoints.
"""

import dataclasses
from typing import Any

import jax
from flax.linen import meta
from jax.sharding import Mesh

from narvl_jax.checkpointing.runs import build_in
from narvl_jax.checkpointing.weights import opened, read_weights
from narvl_jax.checkpointing.writing import restore_target
from narvl_jax.errors import UserError
from narvl_jax.experiment.experiment import Experiment
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.files.stores import as_path
from narvl_jax.models import EncoderDecoder
from narvl_jax.parallel import tree_shardings
from narvl_jax.run_folder import workdir as workdir_lib
from narvl_jax.state.train_state import bytes_per_device
from narvl_jax.training.forcing import forced_input, predicting_states

_KEY = "distillation.teacher"
_FLAG = f"--config.{_KEY}"


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher whose weights are read later.

  Attributes:
    path: folder of its run.
    step: the best checkpoint of the run.
    model: the network.
    prompted: as it was trained, see `forced_input`.
    pad_id: id of padding.
    answer_positions: positions that its decoder reads, and those that predict
      labels.
    shapes: of its variables {"params", "batch_stats"}.
    shardings: of its variables.
  """

  path: str
  step: int
  model: EncoderDecoder
  prompted: tuple[bool, ...]
  pad_id: int
  answer_positions: tuple[int, int]
  shapes: dict[str, Any]
  shardings: dict[str, Any]

  def read(self) -> dict[str, Any]:
    """Reads its variables, moving averages if the run has them."""
    target = restore_target(self.shapes, self.shardings)
    with opened(self.path, _KEY) as (checkpoints, _):
      return read_weights(checkpoints, self.step, target)

  def states(self, variables: Any, batch: Any) -> jax.Array:
    """Returns the decoder states [B, L, D] that predict the labels."""
    tokens, places = forced_input(batch, self.prompted, self.pad_id)
    outputs: Any = self.model.apply(
      variables,
      batch["image"],
      batch["text"],
      tokens,
      image_mask=batch["image_mask"],
    )
    return predicting_states(outputs[1]["decoder_out"], places)

  @property
  def num_parameters(self) -> int:
    """Number of its parameters."""
    return sum(x.size for x in jax.tree.leaves(self.shapes["params"]))

  @property
  def bytes_per_device(self) -> int:
    """Bytes of its variables on one device."""
    return bytes_per_device(self.shapes, self.shardings)


def find_teacher(experiment: Experiment, mesh: Mesh) -> Teacher | None:
  """Returns the teacher of a config without reading its weights.

  Returns:
    The teacher; None if there is none or its weight in the loss is 0.

  Raises:
    UserError: there is no such run, or it does not match the student.
  """
  config = experiment.config
  path = config.distillation.teacher
  if not path or not config.distillation.weight:
    return None
  with opened(path, _KEY) as (_, step):
    folder = as_path(path)
    for name in (workdir_lib.CONFIG_FILE, VOCABULARY_FOLDER):
      if not (folder / name).exists():
        raise UserError(
          f'{_KEY}="{path}" has no {name}; give the folder of a run, or of'
          f" weights that were converted with --vocabulary ({_FLAG})"
        )
    theirs = workdir_lib.read_config(folder)
  # The student's config decides the precision of activations.
  theirs.model.dtype = config.model.dtype
  teacher = build_in(theirs, folder)
  _check(experiment, teacher, path)
  boxed = teacher.abstract_variables()
  return Teacher(
    path=path,
    step=step,
    model=teacher.model,
    prompted=teacher.prompted,
    pad_id=teacher.vocabulary.pad_id,
    answer_positions=_answer_positions(experiment, teacher),
    shapes={"batch_stats": {}, **meta.unbox(boxed)},
    shardings={
      "batch_stats": {},
      **tree_shardings(boxed, mesh, config.mesh.rules),
    },
  )


def _check(student: Experiment, teacher: Experiment, path: str) -> None:
  """Raises `UserError` unless the teacher can read the student's batches."""
  ours, theirs = student.config, teacher.config
  who = f'{_KEY}="{path}"'
  if not teacher.autoregressive:
    kind = teacher.model_config.decoder
    raise UserError(
      f"{who} answers in parallel (model.decoder={kind}), so it has no"
      " distribution for each label; give a run that was trained with"
      f" --config.model.decoder=autoregressive ({_FLAG})"
    )
  prints = [x.vocabulary.fingerprint for x in (teacher, student)]
  # Without tasks only shapes are needed, and the vocabulary is a placeholder.
  if student.tasks and prints[0] != prints[1]:
    raise UserError(
      f"{who} has another vocabulary ({prints[0][:12]}, this run"
      f" {prints[1][:12]}), so its classes mean other words; take that one:"
      f" --config.vocabulary.source=run --config.vocabulary.path={path}, or"
      f" give another teacher ({_FLAG})"
    )
  missing = [name for name in ours.tasks if name not in theirs.tasks]
  if missing:
    raise UserError(
      f"{who} was trained on {', '.join(theirs.tasks)} and not on"
      f" {', '.join(missing)}; leave that out of the tasks of this run, or give"
      f" a teacher of all ({_FLAG})"
    )
  sizes = [tuple(x.data.image_size) for x in (theirs, ours)]
  if sizes[0] != sizes[1]:
    raise UserError(
      f"{who} sees pictures of {sizes[0]} pixels, this run of {sizes[1]}:"
      f" --config.data.image_size='{sizes[0]}' ({_FLAG})"
    )
  _check_length(student, teacher, who)


def _check_length(student: Experiment, teacher: Experiment, who: str) -> None:
  """Raises `UserError` if texts exceed the teacher's positions."""
  text = student.config.data.max_text_length
  limit = teacher.model_config.max_text_positions
  longest = max(text, _answer_positions(student, teacher)[0])
  if longest > limit:
    nearest = text - (longest - limit)
    raise UserError(
      f"{who} has {limit} text positions and would need {longest} for the"
      f" prompts and answers of this run:"
      f" --config.data.max_text_length={nearest}, or another teacher ({_FLAG})"
    )


def _answer_positions(
  student: Experiment, teacher: Experiment
) -> tuple[int, int]:
  """Returns `Teacher.answer_positions`."""
  text, labels = student.config.data.max_text_length, student.label_length
  prompt = text - 1 if any(teacher.prompted) else 1
  # The last label is predicted and never read.
  return prompt + labels - 1, labels
