"""Flags that several commands share: one name for one idea.

| idea                          | flag                                     |
| ----------------------------- | ---------------------------------------- |
| folder of the run             | `--workdir=FOLDER`                       |
| which of its checkpoints      | `--checkpoint=best`, `last` or a step    |
| file or folder to write       | `--to=FILE` or `--to=FOLDER`             |
| split of a data set           | `--split=NAME`                           |
| limit of examples             | `--max_examples=N`                       |
| batch size                    | `--batch_size=N`                         |
| records of a shard            | `--shard_size=N`                         |
| processes, threads            | `--num_workers=N`, `--num_threads=N`     |
| output for programs           | `--json` (stdout) or `--json=FILE`       |
| compiled programs on disk     | `--compilation_cache=FOLDER` or `off`    |

`rename` keeps an old name valid; its use prints a note.
"""

from collections.abc import Iterable
from typing import Any

from absl import flags

# --help of a command lists these flags as its own.
flags.disclaim_key_flags()

# Former name -> current name.
RENAMED: dict[str, str] = {}
STDOUT = "-"


def workdir(text: str = "Folder of the run.") -> None:
  """Defines --workdir."""
  flags.DEFINE_string("workdir", None, text)


def checkpoint(text: str = "") -> None:
  """Defines --checkpoint."""
  flags.DEFINE_string("checkpoint", "best", f"{text}best, last or a step.")


def compilation_cache() -> None:
  """Defines --compilation_cache, which `cli.run` reads."""
  flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder for compiled programs, which the next start reuses, or off;"
    " $JAX_COMPILATION_CACHE_DIR by default, otherwise one in the user's cache"
    " folder.",
  )


def to(text: str, default: str | None = None) -> None:
  """Defines --to."""
  flags.DEFINE_string("to", default, text)


def split(text: str, default: str | None = "") -> None:
  """Defines --split."""
  flags.DEFINE_string("split", default, text)


def request() -> None:
  """Defines the flags of one request: a picture or a record, and a prompt."""
  flags.DEFINE_string("image", None, "Picture file, JPEG or PNG.")
  flags.DEFINE_integer(
    "example", None, "Instead of --image: index of a record of the test data."
  )
  flags.DEFINE_string(
    "dataset",
    "",
    "Entry of data.evaluation for --example; by default the task's first one.",
  )
  split("Split for --example; evaluation.split by default.")
  flags.DEFINE_string("task", None, "One of the run's tasks.")
  flags.DEFINE_string("prompt", None, "Question, expression or hypothesis.")
  flags.DEFINE_string(
    "premise", None, "Entailment: a caption that is known to be true."
  )


def max_examples(
  text: str,
  default: int | None = None,
  *,
  old: str | None = None,
  lower_bound: int | None = None,
) -> None:
  """Defines --max_examples."""
  flags.DEFINE_integer("max_examples", default, text, lower_bound=lower_bound)
  if old:
    rename(old, "max_examples")


def batch_size(
  text: str,
  default: int | None = None,
  *,
  old: str | None = None,
  lower_bound: int | None = None,
) -> None:
  """Defines --batch_size."""
  flags.DEFINE_integer("batch_size", default, text, lower_bound=lower_bound)
  if old:
    rename(old, "batch_size")


def shard_size(
  *, old: str | None = None, lower_bound: int | None = None
) -> None:
  """Defines --shard_size."""
  flags.DEFINE_integer(
    "shard_size",
    2000,
    "Approximate number of records in a shard.",
    lower_bound=lower_bound,
  )
  if old:
    rename(old, "shard_size")


def answers(whose: str = "the run's") -> None:
  """Defines --answers."""
  flags.DEFINE_string(
    "answers", "", f"File of the allowed VQA answers; default: {whose}."
  )


def max_bad_fraction(text: str = "", default: float | None = None) -> None:
  """Defines --max_bad_fraction."""
  flags.DEFINE_float(
    "max_bad_fraction",
    default,
    f"Share of records that may be bad and skipped{text}.",
    lower_bound=0,
    upper_bound=1,
  )


class _ChoiceParser(flags.ArgumentParser):
  """Accepts any text; --help shows the valid ones.

  The command itself rejects other texts, with a better message than absl's.
  """

  def __init__(self, values: Iterable[str]) -> None:
    self.enum_values = tuple(values)


def choice(
  name: str, default: str | None, values: Iterable[str], text: str
) -> None:
  """Defines a flag whose values --help lists and the command checks."""
  parser = _ChoiceParser(values)
  flags.DEFINE(
    parser, name, default, text, serializer=flags.ArgumentSerializer()
  )


def rename(old: str, new: str) -> None:
  """Keeps a former name of a flag valid.

  Args:
    old: former name, without dashes; `flag_parsing.normalise` replaces it and
      prints a note.
    new: current name of the flag.
  """
  RENAMED[old] = new


class _DryRunParser(flags.BooleanParser):
  """True, False or "compile"."""

  def parse(self, argument: Any) -> Any:
    """Returns the value; raises ValueError if it is none of the three."""
    return argument if argument == "compile" else super().parse(argument)


def dry_run() -> None:
  """Defines --dry_run, which is also --dry_run=compile."""
  flag = flags.Flag(
    parser=_DryRunParser(),
    serializer=flags.ArgumentSerializer(),
    name="dry_run",
    default=False,
    help_string="Print shapes, parameters and the bytes of the state, then"
    " stop. --dry_run=compile also prints the memory of the compiled update.",
    boolean=True,
  )
  flags.DEFINE_flag(flag)


class _JsonParser(flags.ArgumentParser):
  """Parses a file name; "true", the value of a bare flag, is stdout."""

  def parse(self, argument: Any) -> str | None:
    """Returns the file, `STDOUT`, or None for neither."""
    if argument in (True, "true", "True"):
      return STDOUT
    return None if argument in (False, "false", "False", "") else str(argument)

  def flag_type(self) -> str:
    """Returns the type of the value, for --help."""
    return "file"


def json() -> None:
  """Defines --json, see `command_line.json_output.write_report`."""
  flag = flags.Flag(
    parser=_JsonParser(),
    serializer=flags.ArgumentSerializer(),
    name="json",
    default=None,
    help_string="Print JSON on stdout and messages on stderr, or write JSON to"
    " FILE.",
    boolean=True,
  )
  flags.DEFINE_flag(flag)
