"""The comparison with the official code, on a checkout that is a stand-in."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from narvl_jax.benchmarks import reference
from narvl_jax.benchmarks.official import checkout
from narvl_jax.errors import UserError
from tests.conftest import ROOT

# In the form of the official repository: `__init__` files that fail, names of
# functions that are also names of modules, defaults that Python 3.11 rejects,
# and packages that are not installed.
_FILES = {
  "models/ofa/__init__.py": "raise ImportError('all of OFA')",
  "models/ofa/ofa_nat.py": """
from fairseq import utils
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerModel
from fairseq.distributed import fsdp_wrap
assert fsdp_wrap(3, min_num_params=1) == 3
@register_model("na_ofa")
class NAOFAModel(TransformerModel):
  @staticmethod
  def add_args(parser):
    TransformerModel.add_args(parser)
    parser.add_argument("--num-queries", type=int, default=100)
    parser.add_argument("--replace-target-embed", action="store_true")
  @classmethod
  def build_model(cls, args, task):
    return args, task.source_dictionary, utils.activation(1)
@register_model_architecture("na_ofa", "na_ofa_tiny")
def ofa_tiny_architecture(args):
  args.encoder_layers = getattr(args, "encoder_layers", 4)
""",
  "fairseq/fairseq/__init__.py": "raise ImportError('all of fairseq')",
  "fairseq/fairseq/utils.py": """
from fairseq.modules import gelu_accurate, gelu
def activation(x):
  return gelu(x) + gelu_accurate(x)
""",
  "fairseq/fairseq/modules/__init__.py": """
from .gelu import gelu, gelu_accurate
from .missing import Missing
""",
  "fairseq/fairseq/modules/gelu.py": """
def gelu(x): return x
def gelu_accurate(x): return 2 * x
""",
  "fairseq/fairseq/models/transformer/__init__.py": (
    "from .transformer_legacy import *"
  ),
  "fairseq/fairseq/models/transformer/transformer_legacy.py": """
from dataclasses import dataclass
from hydra.core.global_hydra import GlobalHydra
from omegaconf import II
from fairseq.dataclass import FairseqDataclass
@dataclass
class Noise(FairseqDataclass):
  p: int = II("noise")
@dataclass
class Config(FairseqDataclass):
  noise: Noise = Noise()
class TransformerModel:
  @staticmethod
  def add_args(parser):
    raise ImportError("options of fairseq")
""",
  "fairseq/fairseq/data/dictionary.py": """
class Dictionary(list):
  def add_symbol(self, name): self.append(name)
""",
}


def test_only_what_the_model_needs_is_imported(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  for name, text in _FILES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  before = dict(sys.modules)
  try:
    settings, dictionary, activation = checkout.build(
      str(tmp_path), "tiny", queries=5, vocab_size=9, dropout=0.1
    )
  finally:
    for name in sys.modules.keys() - before.keys():
      monkeypatch.delitem(sys.modules, name)
  assert (settings.num_queries, settings.encoder_layers) == (5, 4)
  assert (settings.scale_heads, settings.dropout) == (True, 0.1)
  # An omitted switch is absent, so that the architecture's value holds.
  assert not hasattr(settings, "replace_target_embed")
  assert (len(dictionary), dictionary.axe_eps_idx) == (9, 8)
  assert activation == 3


def test_folder_that_is_no_checkout(tmp_path: pathlib.Path) -> None:
  with pytest.raises(
    UserError, match=r"not a checkout of NARVL: .*ofa_nat\.py"
  ):
    checkout.build(str(tmp_path), "tiny", queries=5, vocab_size=9, dropout=0.1)


def _command(*args: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", "narvl_jax.benchmarks.reference", *args],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_nothing_is_measured_without_the_official_code() -> None:
  result = _command()
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.startswith("skipped: ")


def test_table() -> None:
  spread = {"median": 2.0, "min": 1.0, "max": 3.0}
  times = dict.fromkeys(
    ("milliseconds", "cpu_milliseconds", "ratio", "cpu_ratio"), spread
  )
  facts = {"size": "tiny", "logits_difference": 6e-7, "same_answers": True}
  entry = {
    "facts": facts,
    "results": {"encoder": {"official": times}},
    "notes": ["update: failed"],
  }
  text = reference.format_report(
    {"environment": {"torch": "2"}, "entries": [entry]}
  )
  assert "logits differ by 6e-07 of the largest, same answers" in text
  assert "encoder, official  2 (1..3)" in text
  assert text.endswith("update: failed")


def test_official_model_has_our_logits(tmp_path: pathlib.Path) -> None:
  """On a checkout that NARVL_CHECKOUT names."""
  folder = os.environ.get("NARVL_CHECKOUT")
  if not folder:
    pytest.skip("NARVL_CHECKOUT names no clone of amazon-science/NARVL")
  path = tmp_path / "reference.json"
  result = _command(
    *(f"--official={folder}", "--size=tiny", "--tasks=grounding"),
    *("--image_size=32", "--rounds=1", "--nocompiled"),
    *("--operations=encoder,decoder", f"--json={path}"),
  )
  assert result.returncode == 0, result.stderr
  (entry,) = json.loads(path.read_text())["entries"]
  assert entry["facts"]["logits_difference"] < 1e-5
  assert entry["facts"]["same_answers"] is True
  assert set(entry["results"]["decoder"]) == {"narvl_jax", "official"}
