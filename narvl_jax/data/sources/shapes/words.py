"""The words of the shapes world and the combinations kept for `held_out`."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLORS = ("red", "green", "blue", "yellow", "purple", "cyan")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")

PLURALS = {shape: shape + "s" for shape in SHAPES} | {"cross": "crosses"}

RGB = {
  "red": (215, 40, 40),
  "green": (35, 160, 50),
  "blue": (40, 70, 220),
  "yellow": (235, 205, 30),
  "purple": (150, 45, 190),
  "cyan": (30, 195, 210),
}

# Four different colours on four different shapes, so that each colour and
# each shape is still seen in training, five or six ways.
HELD_OUT = (
  ("red", "star"),
  ("green", "circle"),
  ("blue", "cross"),
  ("yellow", "triangle"),
)
SEEN = tuple(
  (color, shape)
  for color in COLORS
  for shape in SHAPES
  if (color, shape) not in HELD_OUT
)

# A side and where an object lies that is on it: axis (0 = x), sign.
SIDES = {
  "left of": (0, -1),
  "right of": (0, 1),
  "above": (1, -1),
  "below": (1, 1),
}
