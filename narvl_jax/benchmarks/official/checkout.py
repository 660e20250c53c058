"""The official PyTorch model, from a checkout of its repository.

Only the modules that the model needs are imported. The packages' `__init__`
files would import all of fairseq, which needs many other packages and does not
support current versions of Python.
"""

import argparse
import ast
import contextlib
import dataclasses
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from narvl_jax.errors import UserError

_MODEL = "models/ofa/ofa_nat.py"
_FAIRSEQ = "fairseq/fairseq"
_PACKAGES = (
  *("fairseq", "fairseq.data", "fairseq.dataclass", "fairseq.distributed"),
  *("fairseq.logging", "fairseq.models", "fairseq.models.nat"),
  *("fairseq.models.transformer", "fairseq.modules"),
  "fairseq.modules.quantization",
)
# Packages that are imported, but that the model does not use.
_UNUSED = ("omegaconf", "hydra", "iopath", "fairseq_cli")
# Switches of all official training scripts (`run_scripts/*_nat`).
_SWITCHES = (
  *("encoder_normalize_before", "decoder_normalize_before"),
  *("share_all_embeddings", "layernorm_embedding"),
  *("patch_layernorm_embedding", "code_layernorm_embedding"),
  *("add_type_embedding", "scale_attn", "scale_fc", "scale_heads"),
  *("disable_entangle", "apply_bert_init", "dynamic_upsample"),
  *("encoder_learned_pos", "decoder_learned_pos"),
)


def build(
  checkout: str, size: str, *, queries: int, vocab_size: int, dropout: float
) -> Any:
  """Returns the official model with its initial weights, a `torch.nn.Module`.

  Args:
    checkout: folder of the repository.
    size: such as "base".
    queries: learnable queries.
    vocab_size: classes, with blank as the last one.
    dropout: of the scripts.

  Raises:
    UserError: the folder is not a checkout of NARVL.
  """
  # The official code is older than an argument that PyTorch asks for.
  warnings.filterwarnings("ignore", "torch.meshgrid")
  with _importing(pathlib.Path(checkout)):
    nat = importlib.import_module("narvl_official.ofa_nat")
    dictionary = importlib.import_module("fairseq.data.dictionary").Dictionary()
    legacy = sys.modules["fairseq.models.transformer.transformer_legacy"]
  # The options of fairseq have defaults in `_SWITCHES` and the architecture.
  legacy.TransformerModel.add_args = staticmethod(lambda parser: None)
  parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
  nat.NAOFAModel.add_args(parser)
  settings = parser.parse_args([f"--num-queries={queries}"])
  vars(settings).update(
    dict.fromkeys(_SWITCHES, True),
    dropout=dropout,
    src_upsample=1.0,
    # Only of the data and the loss, but read.
    patch_image_size=480,
    label_smoothing=0.0,
  )
  names = {"tiny": "ofa_tiny", "medium": "ofa_medium", "large": "ofa_large"}
  name = names.get(size, f"na_ofa_{size}")
  getattr(nat, f"{name}_architecture")(settings)
  while len(dictionary) < vocab_size:
    dictionary.add_symbol(f"token {len(dictionary)}")
  dictionary.axe_eps_idx = vocab_size - 1
  task = types.SimpleNamespace(
    source_dictionary=dictionary, target_dictionary=dictionary
  )
  return nat.NAOFAModel.build_model(settings, task)


@contextlib.contextmanager
def _importing(root: pathlib.Path) -> Iterator[None]:
  """Makes the modules of a checkout importable."""
  for part in (_MODEL, _FAIRSEQ):
    if not (root / part).exists():
      raise UserError(
        f'"{root}" is not a checkout of NARVL: it has no {part} (--official;'
        " clone https://github.com/amazon-science/NARVL)"
      )
  same: Callable[..., Any] = lambda *names: lambda defined: defined  # noqa: E731
  given = {
    # Registries of the command line, and wrappers for several GPUs.
    "register_model": same,
    "register_model_architecture": same,
    "fsdp_wrap": lambda module, **options: module,
    "FairseqDataclass": object,
  }
  folders = {
    name: root / _FAIRSEQ / pathlib.Path(*name.split(".")[1:])
    for name in _PACKAGES
  }
  for name, folder in {
    **folders,
    "narvl_official": root / "models/ofa",
  }.items():
    package = _Package(name, folder, given)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
      setattr(sys.modules[parent], child, package)
  absent = [n for n in _UNUSED if importlib.util.find_spec(n) is None]
  finder, dataclass = _StandIns(absent), dataclasses.dataclass
  sys.meta_path.append(finder)
  try:
    dataclasses.dataclass = _with_mutable_defaults(dataclass)
    yield
  finally:
    dataclasses.dataclass = dataclass
    sys.meta_path.remove(finder)


class _Package(types.ModuleType):
  """A package whose `__init__` is read, but not run.

  `from .module import name` in it makes `name` an attribute that imports the
  module when it is read first.
  """

  def __init__(
    self, name: str, folder: pathlib.Path, given: dict[str, Any]
  ) -> None:
    """Returns a package; `given` are attributes."""
    super().__init__(name)
    self.__path__ = [str(folder)]
    self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    self.__dict__.update(given)
    self._module_of: dict[str, str] = {}
    self._with_all: list[str] = []
    file = folder / "__init__.py"
    if not file.exists():
      return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
        for alias in node.names:
          if alias.name == "*":
            self._with_all.append(node.module)
          else:
            self._module_of[alias.name] = node.module

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    source = self._module_of.get(name)
    for module_name in [source] if source else self._with_all:
      module = importlib.import_module(f"{self.__name__}.{module_name}")
      # A function may have the name of its module, which the import has set.
      for other, origin in self._module_of.items():
        if origin == module_name:
          setattr(self, other, getattr(module, other))
      if hasattr(module, name):
        return getattr(module, name)
    raise AttributeError(f"{self.__name__} has no {name}")


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds packages that are not installed; their attributes are mocks."""

  def __init__(self, names: Sequence[str]) -> None:
    """Returns a finder of packages."""
    self._names = names

  def find_spec(
    self, fullname: str, path: Any = None, target: Any = None
  ) -> importlib.machinery.ModuleSpec | None:
    """See `importlib.abc.MetaPathFinder`."""
    if fullname.partition(".")[0] not in self._names:
      return None
    return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

  def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
    """See `importlib.abc.Loader`."""
    return _StandIn(spec.name)

  def exec_module(self, module: types.ModuleType) -> None:
    """Does nothing."""


class _StandIn(types.ModuleType):
  """A module with every attribute."""

  __path__ = []  # noqa: RUF012

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return mock.MagicMock()


def _with_mutable_defaults(dataclass: Any) -> Any:
  """Returns `dataclass` for classes of fairseq, which share their defaults.

  Python 3.11 rejects a default that is not hashable.
  """

  def decorate(cls: Any = None, **options: Any) -> Any:
    if cls is None:
      return lambda other: decorate(other, **options)
    if cls.__module__.partition(".")[0] == "fairseq":
      options["unsafe_hash"] = True
    return dataclass(cls, **options)

  return decorate
