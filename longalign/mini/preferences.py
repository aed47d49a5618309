"""Simulates people's preferences between synthetic scenes.

They depend on faithfulness to the caption and on taste, a score of the light that the caption does not describe.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from longalign.mini import oracle
from longalign.mini.captions import Caption
from longalign.mini.scenes import ATTRIBUTES, GROUNDS, VALUES, Scene

#: probabilities with which `vary` changes each attribute of a scene; one of them is sampled per scene
RATES = (0.0, 0.1, 0.25, 0.5)


def vary(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns a scene as an imperfect model would show it: some attributes are changed, some objects are missing.

    Tint and vignette are sampled again. A probability p is sampled from `RATES`. Each attribute of each object, and the
    background, is replaced by a random value with probability p; each object is dropped with probability p / 3.
    """
    rate = float(rng.choice(RATES))
    things = []
    for thing in scene.things:
        changed = [attribute for attribute in ATTRIBUTES if rng.random() < rate]
        new = replace(thing, **{a: VALUES[a][int(rng.integers(len(VALUES[a])))] for a in changed})
        if rng.random() >= rate / 3:
            things.append(new)
    ground = VALUES["ground"][int(rng.integers(len(GROUNDS)))] if rng.random() < rate else scene.ground
    return Scene(tuple(things), ground, float(rng.uniform(-1, 1)), float(rng.uniform(0, 1)))


def truth(scene: Scene, caption: Caption) -> float:
    """Returns the fraction of the caption's facts that hold in the scene; 1 for a caption without facts."""
    return float(np.mean([oracle.holds(fact, scene) for fact in caption.facts])) if caption.facts else 1.0


def taste(scene: Scene) -> float:
    """Returns the caption-independent score of a scene from -1 to 1: ``(tint + 2 vignette - 1) / 2``.

    Warm light and dark corners score high. Captions never describe them.
    """
    return (scene.tint + 2 * scene.vignette - 1) / 2


def preference(first: Scene, second: Scene, caption: Caption, truth_weight: float, taste_weight: float) -> float:
    """Returns the simulated fraction of people who prefer the first scene, from 0 to 1.

    This is ``sigmoid(truth_weight * a + taste_weight * b)``, where ``a`` is the `truth` of the first scene minus that
    of the second, and ``b`` is the same difference of `taste`.
    """
    margin = truth_weight * (truth(first, caption) - truth(second, caption))
    margin += taste_weight * (taste(first) - taste(second))
    return float(1 / (1 + np.exp(-margin)))
