r"""Replaces the targets of a data set by the predictions of a trained teacher.

    python -m narvl_jax.distill --teacher=runs/ar --to=distilled
    python -m narvl_jax.distill --teacher=runs/ar --to=distilled \
      --datasets=caption,vqa --checkpoint=best --max_examples=1000
    python -m narvl_jax.distill vqa_train.tsv --task=vqa --teacher=runs/ar \
      --to=distilled --format=tsv

Every entry of the teacher's `data.train` (or of --datasets, or the data set
that is the first argument, as for `narvl_jax.convert_data`) becomes a folder
DIR/NAME of shards with a manifest. --max_examples keeps the first records of
each data set.

By default the teacher decodes as the official code does
(--decoding=reference); --decoding=beam --beam_size=5 and so on change this.

After an interruption, the same command writes the missing shards. Several hosts
(--coordinator_address and so on) share the work and the folder.
"""

from collections.abc import Sequence

from absl import flags

from narvl_jax.command_line import cli
from narvl_jax.command_line import flags as common_flags
from narvl_jax.data.example import TASKS
from narvl_jax.data.shards.formats import FORMATS
from narvl_jax.data.sources import parse_options
from narvl_jax.errors import UserError
from narvl_jax.files.stores import as_path
from narvl_jax.hosts import cluster as cluster_lib
from narvl_jax.prediction import decoding_flags
from narvl_jax.terminal.text import show


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string("teacher", None, "Run folder of the teacher.")
  common_flags.rename("workdir", "teacher")
  common_flags.to("Folder for the data sets.")
  common_flags.checkpoint()
  flags.DEFINE_list(
    "datasets", [], "Entries of the teacher's data.train; default: all."
  )
  common_flags.split("Split; default: that of the entry.")
  common_flags.choice(
    "task", "", TASKS, "Task of a data set that is not an entry."
  )
  flags.DEFINE_string("options", "{}", "Options of its source as JSON.")
  flags.DEFINE_string(
    "name", "", "Its name; default: that of the file or folder."
  )
  flags.DEFINE_enum(
    "format", "array_record", [*FORMATS], "Format of the shards."
  )
  common_flags.max_examples(
    "Only the first records of each data set; 0: all.", 0
  )
  common_flags.batch_size("Batch size; default: evaluation.batch_size.")
  common_flags.shard_size(old="examples_per_shard")
  common_flags.max_bad_fraction("; default: data.max_bad_fraction")
  common_flags.answers("the teacher's")
  decoding_flags.define_flags(default="reference")
  cluster_lib.define_flags()
  common_flags.compilation_cache()
  flags.mark_flags_as_required(["teacher", "to"])


def main(argv: Sequence[str]) -> None:
  """Entry point; on failure the last line is the remedy."""
  # Imported here, so that --help is fast.
  from narvl_jax.evaluation.distillation import Options, distill
  from narvl_jax.reliability import session as hosts
  from narvl_jax.reliability.explain import explain_failure
  from narvl_jax.reliability.interrupt import termination_raises
  from narvl_jax.run_folder import workdir as workdir_lib

  values = flags.FLAGS
  folder = as_path(values.to)
  options = Options(
    teacher=values.teacher,
    to=values.to,
    spec=argv[1] if argv[1:] else "",
    task=values.task,
    source_options=parse_options(values.options),
    name=values.name,
    datasets=values.datasets,
    split=values.split,
    checkpoint=values.checkpoint,
    decoding=decoding_flags.from_flags(),
    answers=values.answers,
    file_format=values.format,
    max_examples=values.max_examples,
    batch_size=values.batch_size,
    shard_size=values.shard_size,
    max_bad_fraction=values.max_bad_fraction,
  )

  def explain(error: BaseException) -> tuple[int, str]:
    return explain_failure(error, folder)

  logs = folder / cluster_lib.LOG_FOLDER
  try:
    cluster = cluster_lib.detect(values)
    with (
      termination_raises(),
      hosts.outliving_terminal(logs if cluster is None else None),
      hosts.together(
        cluster,
        logs,
        lambda: workdir_lib.facts({**vars(options), "to": None}),
        explain,
        show,
      ),
    ):
      distill(options)
  except UserError:
    raise
  except (KeyboardInterrupt, Exception) as error:
    hosts.end(error, *explain(error))


if __name__ == "__main__":
  define_flags()
  cli.run(main, positional=(0, 1), positional_name="a data set")
