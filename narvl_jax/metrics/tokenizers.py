"""Tokenizers of captions; tokens are separated by one space.

Published figures use the Penn Treebank tokenizer of Stanford CoreNLP, which is
a Java program inside of the package pycocoevalcap. Without it
`simple` is used, and figures have another name (`cider@simple`).
"""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence

# Tokens that the official tokenizer removes after splitting.
_PTB_PUNCTUATION = {
  *("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"),
  *(".", "?", "!", ",", ":", "-", "--", "...", ";"),
}
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_NO_PACKAGE = (
  'the package pycocoevalcap is not installed; pip install "narvl_jax[metrics]"'
)
_NO_JAVA = "there is no Java; install a Java runtime, version 8 or later"

Tokenizer = Callable[[Sequence[str]], list[str]]


class Unavailable(Exception):
  """A figure or tokenizer is unavailable; the text names what is missing."""


def package_folder() -> pathlib.Path:
  """Returns the folder of pycocoevalcap, without importing it.

  Raises:
    Unavailable: it is not installed.
  """
  spec = importlib.util.find_spec("pycocoevalcap")
  if spec is None or not spec.submodule_search_locations:
    raise Unavailable(_NO_PACKAGE)
  return pathlib.Path(spec.submodule_search_locations[0])


def java() -> str:
  """Returns the Java program: that of JAVA_HOME, otherwise that of PATH.

  Raises:
    Unavailable: there is none.
  """
  home = os.environ.get("JAVA_HOME")
  found = shutil.which("java", path=f"{home}/bin") if home else None
  found = found or shutil.which("java")
  if found is None:
    raise Unavailable(_NO_JAVA)
  return found


def one_line(text: str) -> str:
  """Returns a text on one line, without characters that UTF-8 cannot encode.

  Otherwise programs that read one text per line would split a caption with a
  line separator, and assign all later ones to the wrong picture.
  """
  return " ".join(text.encode(errors="replace").decode().split())


def ptb(texts: Sequence[str]) -> list[str]:
  """Returns texts as the official tokenizer splits them.

  Raises:
    Unavailable: Java or pycocoevalcap is missing, or the program fails.
  """
  jars = sorted((package_folder() / "tokenizer").glob("stanford-corenlp*.jar"))
  if not jars:
    raise Unavailable("pycocoevalcap lacks the jar of its tokenizer")
  command = [
    *(java(), "-Dfile.encoding=UTF-8", "-cp", str(jars[0])),
    "edu.stanford.nlp.process.PTBTokenizer",
    *("-preserveLines", "-lowerCase", "-encoding", "UTF-8"),
  ]
  # The last line would be lost if the last texts were empty.
  lines = [*map(one_line, texts), "end"]
  done = subprocess.run(
    command,
    input="\n".join(lines) + "\n",
    capture_output=True,
    encoding="utf-8",
    check=False,
  )
  split = done.stdout.split("\n")[: len(lines)]
  if done.returncode or len(split) != len(lines) or split[-1].strip() != "end":
    last = done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
    raise Unavailable(f"the PTB tokenizer failed: {last[0]}")
  return [
    " ".join(x for x in line.split(" ") if x and x not in _PTB_PUNCTUATION)
    for line in split[:-1]
  ]


def simple(texts: Sequence[str]) -> list[str]:
  """Returns texts in lower case, split at all but letters and digits."""
  return [" ".join(_WORD.findall(text.lower())) for text in texts]


@functools.cache
def why_no_ptb() -> str:
  """Returns why `ptb` is unavailable; empty if it works."""
  try:
    return "" if ptb(["A test."]) == ["a test"] else "it gives other tokens"
  except Unavailable as error:
    return str(error)
