"""Flags of a command: its own flags, --help and normalised command lines."""

import ast
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from narvl_jax.command_line.flags import RENAMED
from narvl_jax.terminal.text import show

_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "-helpshort")
_HELP_ALL = ("--helpfull", "-helpfull", "--helpxml", "-helpxml")
_WIDTH = 79
# Type of a flag in absl -> placeholder of its value.
_VALUES = {
  "int": "N",
  "float": "X",
  "comma separated list of strings": "A,B",
  "file": "FILE",
  "config object": "NAME|FILE.py[:ARG]",
}


def own_flags() -> list[flags.Flag]:
  """Returns the command's own flags in the order of their definition.

  Flags of libraries and overrides of a config (`--config.KEY`) are left out.
  """
  found: dict[str, flags.Flag] = {}
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module != sys.argv[0] and not module.startswith("narvl_jax"):
      continue
    found |= {flag.name: flag for flag in defined if "." not in flag.name}
  return list(found.values())


def has_config() -> bool:
  """Returns whether the command has a config."""
  return any(flag.name == "config" for flag in own_flags())


def print_help(main: Callable[..., Any], argv: Sequence[str]) -> bool:
  """Prints help if a command line requests it; returns whether it did.

  Args:
    main: function of the command; the docstring of its module is printed.
    argv: the command line.
  """
  before_end = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
  if any(argument in _HELP_ALL for argument in before_end):
    show(flags.FLAGS.get_help())
    if has_config():
      show(f"\nKeys of the config:\n\n{_describe_keys()}")
    return True
  if not any(argument in _HELP for argument in before_end):
    return False
  text = textwrap.dedent(main.__globals__["__doc__"] or "").strip("\n")
  show(f"{text}\n\nFlags:\n\n{describe_flags()}")
  if has_config():
    show(
      "\nEvery key of the config is a flag, too: --config.KEY=VALUE, such as"
      "\n--config.train.steps=100. docs/config.md and --helpfull list the keys."
    )
  show("\n--helpfull lists the flags of libraries as well.")
  return True


def describe_flags() -> str:
  """Returns the command's own flags with their help, required ones first."""
  own = own_flags()
  own.sort(key=lambda flag: not _is_required(flag))
  lines = []
  for flag in own:
    lines.append(f"  {_form(flag)}")
    # absl puts the values of an enum before its help.
    text = re.sub(r"^<[^>]*>: ", "", " ".join((flag.help or "").split()))
    if _is_required(flag):
      text += " Required."
    elif flag.default not in (None, "", False, [], ()):
      text += f" Default: {_default(flag)}."
    indent = " " * 6
    lines += textwrap.wrap(
      text,
      _WIDTH,
      initial_indent=indent,
      subsequent_indent=indent,
      break_on_hyphens=False,
      break_long_words=False,
    )
  return "\n".join(lines)


def _describe_keys() -> str:
  """Returns every key of a config with its default and help."""
  # This imports jax; --help does not need it.
  from narvl_jax.experiment.config_table import KEYS

  return "\n".join(
    f"  --config.{name}={'' if setting.kind else setting.default}\n"
    f"      {setting.help}"
    + (f" Valid: {setting.limits()}." if setting.limits() else "")
    for name, setting in KEYS.items()
  )


def _form(flag: flags.Flag) -> str:
  kind = flag.parser.flag_type()
  if kind == "file":
    return f"--{flag.name}[=FILE]"
  if flag.boolean:
    return f"--[no]{flag.name}"
  options = getattr(flag.parser, "enum_values", None)
  value = "|".join(options) if options else _VALUES.get(kind, "TEXT")
  return f"--{flag.name}={value}"


def _default(flag: flags.Flag) -> str:
  if isinstance(flag.default, (list, tuple)):
    return ",".join(map(str, flag.default))
  return str(flag.default).lower() if flag.boolean else str(flag.default)


def _is_required(flag: flags.Flag) -> bool:
  """Returns whether a flag must be set."""
  return _has_required_validator(flag) and flag.default is None


def _has_required_validator(flag: flags.Flag) -> bool:
  # absl does not record `mark_flag_as_required` otherwise.
  return any(
    "must have a value other than None" in str(validator.message)
    for validator in flag.validators
  )


def normalise(argv: Sequence[str]) -> list[str]:
  """Returns a command line with current flag names, in the form NAME=VALUE.

  Prints a note for each former name. `--config.KEY VALUE`, `--dry_run true` and
  `--json FILE.json` are joined, because absl expects no separate value for
  boolean flags and config keys.
  """
  result, rest = list(argv[:1]), list(argv[1:])
  while rest:
    argument = rest.pop(0)
    if argument == "--":
      return [*result, argument, *rest]
    found = re.fullmatch(r"(--?)(no)?([\w.]+)((?:=.*)?)", argument, re.DOTALL)
    if found is None:
      result.append(argument)
      continue
    dashes, negated, name, value = found.groups(default="")
    full = negated + name
    if full in RENAMED:
      negated, name = "", full
    if name in RENAMED:
      new = RENAMED[name]
      show(f"note: --{name} is now called --{new}", file=sys.stderr)
      name = new
    if not value and rest and _belongs(name, rest[0]):
      value = f"={rest.pop(0)}"
    result.append(f"{dashes}{negated}{name}{value}")
  return result


def _belongs(name: str, following: str) -> bool:
  """Returns whether an argument is the value of the flag before it."""
  if name == "json":
    return following.endswith(".json") and not following.startswith("--")
  of_config = name.startswith("config.")
  switch = name in flags.FLAGS and flags.FLAGS[name].boolean
  if following.lower() in ("true", "false"):
    return of_config or switch
  if not of_config:
    return False
  try:
    ast.literal_eval(following)
  except (SyntaxError, ValueError):
    return False
  return True
