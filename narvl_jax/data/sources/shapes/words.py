"""The words of the shapes, and the combinations of the split `held_out`."""

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

# Four different colors on four different shapes, so that training has each
# color and each shape in five or six combinations.
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

# Side -> axis (0 = x) and sign of the direction.
SIDES = {
  "left of": (0, -1),
  "right of": (0, 1),
  "above": (1, -1),
  "below": (1, 1),
}
