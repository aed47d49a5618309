"""Prompts and published values for the checks of the published checkpoints."""

from __future__ import annotations

SHORT = "A red fox sleeps on a stone wall."
#: prompts of more than 77 tokens, with one image each to generate
LONG = (
    "A wooden table stands in front of a large window. On the table lies an open book with yellow pages. To the left "
    "of the book stands a white cup with a blue stripe. Steam rises from the cup. Behind the window there are snowy "
    "mountains under a pink morning sky. A grey cat sits on the chair to the right of the table and looks at the cup. "
    "The floor is made of dark planks. The style is that of an oil painting with visible brush strokes.",
    "A narrow street in an old town at night. Wet cobblestones reflect the light of three orange lanterns. On the "
    "right there is a small shop with a green door. A red bicycle leans against the wall next to the door. A woman in "
    "a yellow raincoat walks away from the viewer with an umbrella. The sky is dark blue, and a thin moon hangs above "
    "the roofs. A black cat watches from a window on the left.",
    "A lighthouse with red and white stripes on a cliff. Below it, waves break on black rocks. Two white gulls fly to "
    "the left of the tower. In the background a sailing ship with brown sails is on the horizon. The grass on the "
    "cliff is bright green and bends in the wind. Heavy grey clouds fill the upper half of the picture. A narrow path "
    "of yellow sand leads up to the tower.",
)
#: images of one colour
COLORS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.7, 0.2), "blue": (0.1, 0.2, 0.9)}
MANGA = (
    "A young adult Japanese delinquent with a pompadour hairstyle named Jotaro Kujo stands in an action pose ready for "
    "a fight on the cover of a manga issue."
)
#: image file, prompt and HPS v2 score: the first from a user's comment in issue 27 of tgxs002/HPSv2, the others from
#: the maintainer's in issue 19. The model cards of HPSv2 and PickScore state no values.
HPS_EXAMPLES = (
    ("demo_image.jpg", "A cat with two horns on its head", 0.2876),
    *((f"{i}.png", MANGA, score) for i, score in enumerate((0.2632, 0.2625, 0.2644, 0.2632, 0.2642), 1)),
)
#: modes of eta, read off a figure of the paper (arXiv 2410.11817, section 3.2)
ETA = {"denscore": "0.73", "pickscore": "0.90", "clip-h": "0.48"}
