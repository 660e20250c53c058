"""Writes converted weights as a run folder; reads weights from one."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from narvl_jax.checkpointing.chosen import read_chosen
from narvl_jax.checkpointing.record_checks import check_config
from narvl_jax.checkpointing.writing import FOLDER, Checkpoints
from narvl_jax.data.vocabulary import files
from narvl_jax.data.vocabulary.files import read_json_object
from narvl_jax.data.vocabulary.vocabulary import Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment import experiment as experiment_lib
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.config_checks import validate
from narvl_jax.experiment.vocabulary import VOCABULARY_FOLDER
from narvl_jax.files.disk import atomically, write_json
from narvl_jax.files.paths import check_file, check_folder
from narvl_jax.files.store_cache import local_copy
from narvl_jax.files.stores import as_path, is_remote
from narvl_jax.interop.conversion import Conversion
from narvl_jax.interop.source_file import setting
from narvl_jax.interop.tensors import PathLike, State, check_bytes
from narvl_jax.interop.torch_file import read_torch
from narvl_jax.interop.torch_write import write_torch
from narvl_jax.models import ModelConfig, model_config
from narvl_jax.run_folder import workdir as workdir_lib

REPORT_FILE = "report.json"
SIDE_FILE = "official_unused.pt"
_NUM_CODES, _NUM_BINS = 8192, 1000
# Field of the section `vocabulary` -> flag of `convert`.
_VOCABULARY_FLAGS = {
  "path": "--vocabulary",
  "source=huggingface": "--vocabulary=FOLDER of vocab.json and merges.txt",
  "num_codes": "--num_codes",
  "num_bins": "--num_bins",
}
# Longest chain of runs that start from runs; a longer one is a cycle.
_MAX_ANCESTORS = 20


def check_target(folder: PathLike) -> None:
  """Raises UserError unless a folder is new or empty, and writable."""
  path = as_path(folder)
  check_folder("--to", folder)
  if path.is_dir() and any(path.iterdir()):
    raise UserError(f"--to={folder} is not empty; use a folder that is new")


def check_file_target(file: PathLike) -> None:
  """Raises UserError if an official file exists or cannot be written."""
  path = as_path(file)
  if path.is_symlink() or path.exists():
    raise UserError(f"--to={file} exists; name a new file")
  check_file("--to", file)


def cannot_write(target: PathLike, error: OSError) -> UserError:
  """Returns the error of a target that cannot be written."""
  return UserError(
    f"--to={target} cannot be written: {error.strerror or error}; use another"
    " place"
  )


def check_size(made: Conversion, config: Any) -> None:
  """Raises UserError if a config has another size than the weights."""
  size = config.model.size
  if size == made.size:
    return
  width = model_config(size).width
  raise UserError(
    f"--config is of size {size} (D={width}), but"
    f" --from={made.source.origin} of size {made.size} (D={made.config.width});"
    f" set --config.model.size={made.size}, for a recipe"
    f" --config=FILE.py:size={made.size}"
  )


@dataclasses.dataclass(frozen=True)
class VocabularyFiles:
  """The vocabulary of weights to convert.

  Attributes:
    folder: folder of the official or the Hugging Face files; None looks beside
      the weights.
    num_codes: image codes; None: as in the settings of the file, or 8192.
    num_bins: coordinate bins; None: as in the settings of the file, or 1000.
  """

  folder: PathLike | None = None
  num_codes: int | None = None
  num_bins: int | None = None


def find_vocabulary(
  made: Conversion, given: VocabularyFiles
) -> tuple[Vocabulary | None, dict[str, Any]]:
  """Reads the vocabulary of converted weights.

  Returns:
    The vocabulary (None if no folder was named and no files were found) and
    the section `vocabulary` of a config.

  Raises:
    UserError: the files are missing, or do not belong to the weights.
  """
  counts = {
    "num_codes": given.num_codes or _count(made, "code_dict_size", _NUM_CODES),
    "num_bins": given.num_bins or _count(made, "num_bins", _NUM_BINS),
  }
  folder = given.folder
  place = as_path(folder or made.source.origin.parent)
  if folder is not None and not place.is_dir():
    raise UserError(f"--vocabulary={folder}: there is no such folder")
  paths = {
    source: [place / name for name in names]
    for source, names in files.NAMES.items()
    if all((place / name).is_file() for name in names)
  }
  kind = next(iter(paths), None)
  if kind is None and folder is None:
    return None, {"source": "official", "path": "", **counts}
  if kind is None:
    known = " nor ".join(", ".join(names) for names in files.NAMES.values())
    raise UserError(f"--vocabulary={folder} contains neither {known}")
  with _flags_of_convert():
    vocabulary = Vocabulary.from_files(kind, paths[kind], **counts)
  # OFA predicts no blank.
  blank = 1 if made.config.decoder == "parallel" else 0
  found, size = vocabulary.size - 1 + blank, made.config.vocab_size
  if found != size:
    raise UserError(
      f"the vocabulary in {place} has {found} ids with"
      f" {counts['num_codes']} codes and {counts['num_bins']} bins, the"
      f" weights have {size}; set --vocabulary to the folder of their files,"
      " --num_codes and --num_bins"
    )
  return vocabulary, {"source": kind, "path": str(place), **counts}


def _count(made: Conversion, name: str, default: int) -> int:
  """Returns a number of ids in the settings of a file.

  Raises:
    UserError: it is not a number, or exceeds the ids of the weights.
  """
  value = setting(made.source.settings, name)
  if value is None:
    return default
  if type(value) is not int or not 0 <= value <= made.config.vocab_size:
    shown = f"{value:,}" if type(value) is int else type(value).__name__
    raise UserError(
      f"--from={made.source.origin} has {name}={shown}, but its weights have"
      f" {made.config.vocab_size:,} ids; set --num_codes and --num_bins"
    )
  return value


@contextlib.contextmanager
def _flags_of_convert() -> Iterator[None]:
  """Replaces the flags of a run in messages by those of `convert`."""
  try:
    yield
  except UserError as error:
    text = str(error)
    for theirs, ours in _VOCABULARY_FLAGS.items():
      text = text.replace(f"--config.vocabulary.{theirs}", ours)
    raise UserError(text) from error


def write_run(
  folder: PathLike,
  made: Conversion,
  config: Config,
  vocabulary: Vocabulary | None,
  report: dict[str, Any],
) -> None:
  """Writes a run folder with one checkpoint, 0, atomically.

  Args:
    folder: new or empty.
    config: run config with the model of the weights.
    vocabulary: vocabulary of the weights; without it runs can start from the
      folder (`config.init_from`), but nothing can evaluate it.
    report: becomes `report.json`.

  Raises:
    UserError: config and weights do not match, or the folder cannot be
      written.
  """
  validate(config, fit=False)
  if vocabulary is not None:
    architecture = experiment_lib.resolve_model_config(config, vocabulary)
    _check_same(architecture, made.config)
  target = as_path(folder)
  # Nothing can be renamed in a store, where the config is written last.
  place = (
    contextlib.nullcontext(target) if is_remote(target) else atomically(target)
  )
  with place as part:
    try:
      part.mkdir(parents=True)
    except OSError as error:
      raise cannot_write(folder, error) from error
    _place(made.variables)
    with Checkpoints(part, keep_last=1) as checkpoints:
      checkpoints.save_variables(0, made.variables)
    side = {"unused": made.unused, "settings": made.source.settings or {}}
    write_torch(part / SIDE_FILE, side)
    if vocabulary is not None:
      vocabulary.save(part / VOCABULARY_FOLDER)
    write_json(part / REPORT_FILE, report, indent=1)
    workdir_lib.write_config(part, config)


def _place(tree: dict[str, Any]) -> None:
  """Moves arrays to the first device, one by one and in place.

  Orbax would copy NumPy arrays before it writes them.
  """
  for key, value in tree.items():
    if isinstance(value, dict):
      _place(value)
    else:
      tree[key] = jax.device_put(value, jax.devices()[0])


def _check_same(made: ModelConfig, wanted: ModelConfig) -> None:
  """Raises UserError if settings that shape the parameters differ."""
  free = {"dtype", "dropout", "encoder_drop_path", "decoder_drop_path"}
  free |= {"attention", "batch_norm", "init_stddev", "remat", "scan_unroll"}
  if wanted.decoder == "autoregressive":
    free.add("num_queries")
  for name, value in vars(wanted).items():
    if name not in free and getattr(made, name) != value:
      raise UserError(
        f"model.{name}={getattr(made, name)} of the config is not that of the"
        f" weights: --config.model.{name}={value}"
      )


def read_run(
  folder: PathLike, checkpoint: str = "best"
) -> tuple[ModelConfig, dict[str, Any], int]:
  """Reads the weights of a run in their stored dtypes.

  Args:
    folder: folder of a run or of converted weights.
    checkpoint: "best", "last" or a step.

  Returns:
    The architecture, {"params", "batch_stats"} (moving averages if the run
    has them), and the step.

  Raises:
    UserError: there is no such run or checkpoint.
  """
  path = as_path(folder)
  if not (path / FOLDER).is_dir():
    raise UserError(
      f"--from={folder} is no run: it has no folder {FOLDER} (an official file"
      " is converted to a folder, not to a file: --to=FOLDER)"
    )
  config = workdir_lib.read_config(path)
  words = path / VOCABULARY_FOLDER
  if words.is_dir():
    vocabulary = Vocabulary.load(words)
  else:
    model = read_json_object(path / REPORT_FILE)["model"]
    # The blank is an id, but no class of an autoregressive model.
    blank = config.model.decoder == "autoregressive"
    vocabulary = Vocabulary.placeholder(model["vocab_size"] + blank, 0, 0)
  architecture = experiment_lib.resolve_model_config(config, vocabulary)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def target(tree: Any) -> Any:
    return {"params": {}, "batch_stats": {}} | jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
    )

  def read(checkpoints: Checkpoints, step: int) -> tuple[dict[str, Any], int]:
    check_config(path, config, checkpoints.read_record(step))
    stored = checkpoints.shapes(step)
    ema = target(stored["ema"]) if "ema" in stored else None
    weights = target(stored["params"])
    return checkpoints.restore_variables(step, weights, ema), step

  return architecture, *read_chosen(path, checkpoint, read)


def read_side(folder: PathLike) -> tuple[State, dict[str, Any]]:
  """Returns unused tensors and settings of an official file, empty if unknown.

  It is in the folder of the converted weights that the run, or one of its
  ancestors, started from.
  """
  path = as_path(folder)
  for _ in range(_MAX_ANCESTORS):
    if (path / SIDE_FILE).is_file():
      content = read_torch(local_copy(path / SIDE_FILE))
      check_bytes(content["unused"])
      return content["unused"], content["settings"]
    if not workdir_lib.is_run(path):
      break
    start = workdir_lib.read_config(path).init_from
    if not start:
      break
    path = as_path(start)
  return {}, {}
