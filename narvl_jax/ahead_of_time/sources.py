"""Cost of a compiled program by part of the model.

The parts are found by the names of modules and operations in the metadata that
JAX gives to XLA (`op_name`). XLA names a fusion after one of its operations,
so the split between neighbouring parts is approximate.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from narvl_jax.ahead_of_time.costs import Line
from narvl_jax.ahead_of_time.topology import Chip
from narvl_jax.terminal.tables import format_columns

# (part, pattern of op_name, how it could cost less); the first match counts.
_PARTS = (
  (
    "ResNet convolutions",
    r"resnet.*conv_general_dilated",
    "fewer pixels (data.image_size), or fewer rows a chip",
  ),
  (
    "ResNet BatchNorm",
    r"resnet.*(bn\d|_bn)/",
    "fixed statistics (model.batch_norm=frozen)",
  ),
  (
    "ResNet other",
    r"resnet",
    "recompute more in the backward pass (model.remat), so that less is saved",
  ),
  (
    "image stem",
    r"/encoder/stem/",
    "fewer pixels (data.image_size), or larger patches (model.patch_size)",
  ),
  (
    "encoder attention",
    r"/encoder/.*self_attn/"
    r"(bqhd,|bhqk,|softmax|exp|sub|add|div|reduce|convert|select|stop|max"
    r"|jit\(_where|reshape|broadcast|transpose)",
    "a kernel that keeps the weights [B, H, S, S] out of memory"
    " (model.attention)",
  ),
  (
    "encoder kernels",
    r"/encoder/.*pallas_call|(?i:attention).*pallas_call",
    "larger blocks, or fewer passes over keys and values",
  ),
  (
    "encoder projections",
    r"/encoder/.*self_attn/",
    "narrower types, or fewer passes over the activations",
  ),
  (
    "encoder position biases",
    r"/encoder/.*(position_bias|rel_pos|grch|ghqkc|token_bias|image_bias)",
    "expand the tables once for all rows, without one-hot products",
  ),
  (
    "encoder layer norms",
    r"/encoder/.*(layer_?norm|attn_ln|pos_ln)",
    "variance in one pass",
  ),
  (
    "encoder FFN",
    r"/encoder/.*ffn/",
    "more rows a chip, or fewer recomputed products (model.remat)",
  ),
  (
    "encoder dropout",
    r"/encoder/.*(Dropout|bernoulli|threefry|random_bits)",
    "a cheaper generator (jax_default_prng_impl=rbg)",
  ),
  (
    "encoder other",
    r"/encoder/",
    "look at the copies and transposes of the largest instruction",
  ),
  (
    "decoder",
    r"decoder",
    "keys and values of the encoder's output take most of its operations",
  ),
  (
    "metrics",
    r"/metrics/|\(metrics\)",
    "the norm of the gradient reads it once more",
  ),
  (
    "loss head",
    r"loss_head|query_ctc|jvp\(",
    "fewer classes a chip (mesh.tensor)",
  ),
  (
    "moving averages",
    r"/ema/",
    "shard parameters (mesh.fsdp), or do without (optimizer.ema_decay=0)",
  ),
  (
    "optimizer",
    r"/optimizer/",
    "group parameters of one shape, or shard them (mesh.fsdp)",
  ),
  (
    "other",
    r".",
    "look at the names of its largest instructions",
  ),
  (
    "unnamed copies",
    r"",
    "change the layouts that the neighbouring operations want",
  ),
)
_PATTERNS = [(name, re.compile(pattern)) for name, pattern, _ in _PARTS]
_ADVICE = {name: advice for name, _, advice in _PARTS}


@dataclasses.dataclass
class Part:
  """Cost of a part of the model in one run of a program.

  Attributes:
    name: of the part.
    forward: seconds of the forward pass, or of what has no passes.
    recomputed: seconds of what remat computes again.
    backward: seconds of the backward pass.
    flops: of products and kernels.
    hbm_bytes: read and written.
    largest: its most expensive instruction.
  """

  name: str
  forward: float = 0.0
  recomputed: float = 0.0
  backward: float = 0.0
  flops: float = 0.0
  hbm_bytes: float = 0.0
  largest: Line | None = None

  @property
  def seconds(self) -> float:
    """All passes."""
    return self.forward + self.recomputed + self.backward

  @property
  def advice(self) -> str:
    """How it could cost less."""
    return _ADVICE[self.name]


def part_of(op_name: str) -> str:
  """Returns the part of the model that an operation belongs to."""
  return next(name for name, found in _PATTERNS if found.search(op_name))


def split(lines: Sequence[Line], chip: Chip) -> list[Part]:
  """Returns the parts of a program, the most expensive first."""
  parts: dict[str, Part] = {}
  for line in sorted(lines, key=lambda line: -line.seconds(chip)):
    name = part_of(line.op_name)
    part = parts.setdefault(name, Part(name, largest=line))
    when = _pass_of(line.op_name)
    setattr(part, when, getattr(part, when) + line.seconds(chip))
    part.flops += line.flops
    part.hbm_bytes += line.hbm_bytes
  return sorted(parts.values(), key=lambda part: -part.seconds)


def _pass_of(op_name: str) -> str:
  if "rematted_computation" in op_name:
    return "recomputed"
  return "backward" if "transpose(" in op_name else "forward"


def format_parts(
  lines: Sequence[Line], chip: Chip, *, chunked: bool = False
) -> str:
  """Returns a table of the parts, and advice on the three largest.

  Args:
    lines: instructions of the program.
    chip: runs the program.
    chunked: whether the loss computes the logits in chunks of the classes.
  """
  parts = split(lines, chip)
  total = sum(part.seconds for part in parts) or 1.0
  head = ("by part", "ms", "%", "forward", "recomputed", "backward")
  rows = [(*head, "GFLOP", "HBM GB")]
  rows += [
    (
      part.name,
      f"{1e3 * part.seconds:.2f}",
      f"{100 * part.seconds / total:.1f}",
      *(
        f"{1e3 * x:.2f}" for x in (part.forward, part.recomputed, part.backward)
      ),
      f"{part.flops / 1e9:.1f}",
      f"{part.hbm_bytes / 1e9:.2f}",
    )
    for part in parts
  ]
  return "\n".join([format_columns(rows), *_largest(parts[:3], chip, chunked)])


def _largest(parts: Sequence[Part], chip: Chip, chunked: bool) -> Iterator[str]:
  for part in parts:
    line = part.largest
    assert line is not None
    advice = part.advice
    if part.name == "loss head" and chunked:
      advice += ", or larger chunks of them (loss.chunk_size)"
    shape = re.sub(r"\{[^}]*\}", "", line.type)[:60]
    yield (
      f"{part.name}: {advice}; its largest instruction: {line.count} x"
      f" {line.name} {shape}, {1e3 * line.seconds(chip):.2f} ms,"
      f" {line.hbm_bytes / 1e9:.2f} GB"
    )
