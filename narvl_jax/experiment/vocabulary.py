"""The vocabulary of a run: read from files, or trained on its data."""

from collections.abc import Iterator, Sequence

from narvl_jax.data.batches.bad_records import BadRecord
from narvl_jax.data.batches.entry import MixtureEntry
from narvl_jax.data.sources.subset import Subset
from narvl_jax.data.tasks import vocabulary_texts
from narvl_jax.data.vocabulary import files
from narvl_jax.data.vocabulary.vocabulary import OFFICIAL_FIXED_IDS, Vocabulary
from narvl_jax.errors import UserError
from narvl_jax.experiment.config import Config
from narvl_jax.experiment.datasets import DataSets
from narvl_jax.files.stores import as_path
from narvl_jax.terminal import progress
from narvl_jax.terminal.activity import Activity

VOCABULARY_FOLDER = "vocabulary"
# Source -> the files that it reads in the folder `path`.
_FILES = {"train": (), "run": (VOCABULARY_FOLDER,), **files.NAMES}
# Records of each source that a trained vocabulary has seen.
_VOCABULARY_RECORDS = 4000


def make_vocabulary(
  config: Config, datasets: DataSets | None = None
) -> Vocabulary:
  """Reads or trains the vocabulary of a config.

  Args:
    config: validated.
    datasets: opened data sets of the config, if any.

  Raises:
    UserError: its files are missing, or its size is too small.
  """
  settings = config.vocabulary
  counts = {"num_codes": settings.num_codes, "num_bins": settings.num_bins}
  if settings.source == "train":
    with progress.doing("training the vocabulary", unit="texts") as training:
      entries = (datasets or DataSets(config)).train
      texts = _texts(config, entries, training)
      return Vocabulary.train(texts, settings.size, **counts)
  check_vocabulary_files(config)
  folder = as_path(settings.path)
  paths = [folder / name for name in _FILES[settings.source]]
  if settings.source == "run":
    return Vocabulary.load(*paths)
  return Vocabulary.from_files(settings.source, paths, **counts)


def check_vocabulary_files(config: Config) -> None:
  """Checks that the files of the vocabulary exist, without reading them.

  Raises:
    UserError: `vocabulary.path` lacks a file that `vocabulary.source` needs.
  """
  settings = config.vocabulary
  folder = as_path(settings.path)
  needed = _FILES[settings.source]
  for name in needed:
    if (folder / name).exists():
      continue
    kind = "the folder of a run" if settings.source == "run" else "a folder"
    raise UserError(
      f'vocabulary.path="{settings.path}" has no {name}; with'
      f" vocabulary.source={settings.source} it must be {kind} with"
      f" {', '.join(needed)}"
      " (--config.vocabulary.path=FOLDER)"
    )


def placeholder_vocabulary(
  config: Config, datasets: DataSets | None = None
) -> Vocabulary:
  """Returns a vocabulary of the right size without training it."""
  settings = config.vocabulary
  counts = {"num_codes": settings.num_codes, "num_bins": settings.num_bins}
  if settings.source in ("huggingface", "run"):
    # The size is known only from its files.
    return make_vocabulary(config, datasets)
  size = settings.size
  if settings.source == "official":
    size = OFFICIAL_FIXED_IDS + sum(counts.values())
  return Vocabulary.placeholder(size, **counts)


def _texts(
  config: Config, entries: Sequence[MixtureEntry], training: Activity
) -> Iterator[str]:
  for source, task, _, name in entries:
    count = min(len(source), _VOCABULARY_RECORDS)
    # Spread over the source, which may be sorted.
    stride = len(source) // count
    records = Subset(source, range(0, count * stride, stride))
    bad: list[BadRecord] = []
    found = False
    for text in vocabulary_texts(
      task, dict(config.tasks[task]), records, bad.append
    ):
      found = True
      training.advance()
      yield text
    if not found:
      problem = bad[0].what if bad else f"{records.locate(0)} has no text"
      raise UserError(
        f"no record of {name} that was read for the vocabulary is good:"
        f" {problem} (see python -m narvl_jax.check_data)"
      )
