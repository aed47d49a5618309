"""Generates captions of synthetic scenes, from about ten words to 800 CLIP tokens, or to any length with filler.

Each sentence has the list of facts that it states. Filler are sentences that state no fact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from longalign.mini.scenes import COLOURS, FILLS, GROUNDS, PLACES, SHAPES, SIZES, Scene, Thing

STYLES = ("plain", "referring")

WHERE = {
    "top left": ("in the top left", "in the top left corner", "in the upper left corner"),
    "top": ("at the top", "at the top in the middle", "in the middle of the top row"),
    "top right": ("in the top right", "in the top right corner", "in the upper right corner"),
    "left": ("on the left", "in the middle of the left side", "on the left in the middle row"),
    "centre": ("in the centre", "in the very centre", "in the middle of the picture"),
    "right": ("on the right", "in the middle of the right side", "on the right in the middle row"),
    "bottom left": ("in the bottom left", "in the bottom left corner", "in the lower left corner"),
    "bottom": ("at the bottom", "at the bottom in the middle", "in the middle of the bottom row"),
    "bottom right": ("in the bottom right", "in the bottom right corner", "in the lower right corner"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
FILL_WORDS = {"solid": ("solid", "filled"), "striped": ("striped", "banded"), "hollow": ("hollow", "outlined")}

GROUND_CLAUSES = ("on a {ground} ground", "on a {ground} background", "before a {ground} ground")
GROUND_SENTENCES = (
    "The ground is {ground}.",
    "The background of the picture is {ground}.",
    "All of this is set on a {ground} ground.",
)
GROUND_WORDY = (
    "Behind everything that can be seen here, the ground of the whole picture is painted in an even {ground}.",
    "From one edge of the image to the other, the background has been kept in {ground}.",
)
WHOLE = (
    "There is {a} {where}.",
    "{where} there is {a}.",
    "One can see {a} {where}.",
    "{where} sits {a}.",
    "The picture shows {a} {where}.",
)
INTROS = (
    "There is a {shape} {where}.",
    "{where} there is a {shape}.",
    "A {shape} can be found {where}.",
    "The object {where} is a {shape}.",
)
INTROS_WORDY = (
    "Looking at the picture for a moment, one finds that the object which sits {where} is a {shape}.",
    "If the eye now turns to what is {where}, it will find that a {shape} has been placed there.",
    "As for the part of the image that lies {where}, it holds a single {shape}.",
)
TWO = (
    "{The} is {size} and {colour}.",
    "{The} is {colour} and {size}.",
    "{The} has a {size} size and a {colour} colour.",
)
COLOUR = ("{The} is {colour}.", "The colour of {the} is {colour}.", "{The} is painted in {colour}.")
COLOUR_WORDY = (
    "When it comes to its colour, {the} is without any doubt {colour}.",
    "The paint that has been used for {the} is of a clear and even {colour}.",
)
SIZE = ("{The} is {size}.", "{The} has a {size} size.", "In size {the} is {size}.")
SIZE_WORDY = (
    "Compared with the room that there is for it, {the} is really rather {size}.",
    "As far as its size is concerned, {the} can only be called {size}.",
)
FILL = ("{The} is {fill}.", "The inside of {the} is {fill}.", "In its make {the} is {fill}.")
FILL_WORDY = (
    "On a closer look at how it is drawn, it turns out that {the} is {fill}.",
    "The way in which the inside of {the} has been done is {fill}.",
)
EMPTY = ("There is nothing {where}.", "The place {where} is empty.", "Nothing can be seen {where}.")
FILLER = (  # only words of the other phrases, because the bundled models know no other words
    "From the place {there} the eye now turns to the part of the picture that lies {where}.",
    "Looking from the part {there} to the part {where}, one can see how the whole of this image has been painted.",
    "Compared with what can be seen {there}, the part that lies {where} is drawn in the way in which all of this has "
    "been done.",
    "When the eye comes to the part of the image that lies {where}, it turns for a moment to the place {there}.",
)
IT = ("it", "this one", "this object", "it")
LAST_LEVEL = 5


@dataclass(frozen=True)
class Fact:
    """One statement of a caption about a scene.

    Attributes:
        kind: "shape", "colour", "size" or "fill" for this attribute of the object at ``place``; "empty" if there is no
            object at ``place``; "ground" for the colour of the background.
        value: the stated value, e.g. "red"; empty for the kind "empty".
        place: one of `longalign.mini.scenes.PLACES`, e.g. "top left"; empty for the kind "ground".
    """

    kind: str
    value: str
    place: str = ""


@dataclass(frozen=True)
class Sentence:
    """One sentence of a caption, and the facts that the sentence states."""

    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class Caption:
    """A caption of a scene, as sentences in reading order."""

    sentences: tuple[Sentence, ...]

    @property
    def text(self) -> str:
        """The sentences joined with spaces."""
        return " ".join(s.text for s in self.sentences)

    @property
    def num_words(self) -> int:
        """Number of words of the caption; words are separated by spaces."""
        return sum(s.text.count(" ") + 1 for s in self.sentences)

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All facts that the sentences state, in reading order."""
        return tuple(fact for s in self.sentences for fact in s.facts)


def describe(
    scene: Scene, rng: np.random.Generator, *, words: int = 40, style: str = "plain", filler: bool = False
) -> Caption:
    """Returns a caption of a scene with about ``words`` words.

    With more words, each object is described in more detail, from one clause to one wordy sentence per fact; then empty
    places are listed. With few words, sizes and fills are omitted first, then whole objects. Without ``filler``,
    captions of scenes with few objects can have fewer than ``words`` words. A CLIP token is about 0.9 words.

    Args:
        scene: the scene to describe.
        rng: source of the random numbers, for the phrases and the order of the objects.
        words: target length in words: 8 gives a short clause; 480 gives over 500 CLIP tokens with seven objects or
            more.
        style: "plain" (self-contained sentences) or "referring" (sentences with pronouns, such as "It is red.").
        filler: whether a caption that states every fact in fewer than ``words`` words is extended to this length by
            sentences that state no fact, between the descriptions of the objects.

    Raises:
        ValueError: if the style is unknown or ``words`` is below 1.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if words < 1:
        raise ValueError(f"words must be at least 1, got {words}")
    things = [scene.things[int(i)] for i in rng.permutation(len(scene.things))]
    empty = [p for p in PLACES if scene.at(p) is None]
    empty = [empty[int(i)] for i in rng.permutation(len(empty))]
    builder = _CaptionBuilder(scene, things, empty, style, int(rng.integers(2**31)))

    def length(steps: int) -> int:
        return builder.caption(*_plan(steps, len(things), len(empty))).num_words

    # Each step adds an object, then detail to an object, then an empty place. Bisection finds the fewest steps that
    # reach the target length.
    max_steps = len(things) * (LAST_LEVEL + 1) + len(empty)
    low, high = min(1, max_steps), max_steps
    while low < high:
        middle = (low + high) // 2
        if length(middle) >= words:
            high = middle
        else:
            low = middle + 1
    if low > 1 and low <= len(things) and length(low) > words:
        low -= 1  # if objects are omitted, prefer the shorter caption
    plan = _plan(low, len(things), len(empty))
    missing = words - builder.caption(*plan).num_words if filler else 0
    return builder.caption(*plan, num_filler_words=missing)


def _plan(steps: int, num_things: int, num_empty: int) -> tuple[list[int], int]:
    """Returns the level of detail (0 to `LAST_LEVEL`) of each described object, and the number of empty places to list.

    Args:
        steps: how often the shortest caption is made longer: first by objects at level 0, then by one level of detail
            for one object at a time, then by empty places.
        num_things: number of objects of the scene.
        num_empty: number of empty places of the scene.
    """
    if steps <= num_things:
        return [0] * steps, 0
    object_steps = num_things * (LAST_LEVEL + 1)
    if steps >= object_steps:
        return [LAST_LEVEL] * num_things, steps - object_steps
    level, raised = divmod(steps, num_things)
    return [level] * raised + [level - 1] * (num_things - raised), 0


class _CaptionBuilder:
    """Builds captions of one scene. The text of an object depends only on its level of detail, not on other levels.

    Args:
        scene: the scene.
        things: the objects in the order of their description.
        empty: the empty places in the order of their description.
        style: "plain" or "referring".
        seed: seed of the choice of phrases.
    """

    def __init__(self, scene: Scene, things: list[Thing], empty: list[str], style: str, seed: int):
        self.scene, self.things, self.empty, self.style, self.seed = scene, things, empty, style, seed
        self.clause = cache(lambda i, level: _clause(things[i], level, Random(seed + i)))
        self.sentences = cache(lambda i, level: _thing(things[i], level, style, Random(seed + i)))

    def caption(self, levels: list[int], num_empty: int, num_filler_words: int = 0) -> Caption:
        rng = Random(self.seed + 100)
        ground = (Fact("ground", self.scene.ground),)
        if not levels:
            text = _capital(_pick(rng, GROUND_CLAUSES)).format(ground=self.scene.ground) + "."
            blocks = [[Sentence(text, ground)], *self._empty(num_empty)]
            return self._filled(blocks, num_filler_words)
        highest = max(levels)
        blocks: list[list[Sentence]] = []
        clauses = [self.clause(i, level) for i, level in enumerate(levels) if level <= 1]
        for start in range(0, len(clauses), 3):
            group = clauses[start : start + 3]
            text = group[0][0] if len(group) == 1 else ", ".join(c for c, _ in group[:-1]) + " and " + group[-1][0]
            facts = tuple(f for _, fs in group for f in fs)
            if start == 0 and highest == 1:
                text, facts = f"{text} {_pick(rng, GROUND_CLAUSES)}".format(ground=self.scene.ground), facts + ground
            blocks.append([Sentence(_capital(text) + ".", facts)])
        blocks += [self.sentences(i, level) for i, level in enumerate(levels) if level > 1]
        if highest > 1:
            bank = GROUND_WORDY if highest == LAST_LEVEL else GROUND_SENTENCES
            text = _pick(rng, bank).format(ground=self.scene.ground)
            blocks.insert(len(blocks) if rng.random() < 0.5 else 0, [Sentence(text, ground)])
        return self._filled([*blocks, *self._empty(num_empty)], num_filler_words)

    def _filled(self, blocks: list[list[Sentence]], num_words: int) -> Caption:
        """Returns a caption of the blocks in order, with ``num_words`` or more words of filler between them.

        The sentences of a block, e.g. those of one object, stay together.
        """
        rng, blocks = Random(self.seed + 300), [list(block) for block in blocks]
        while num_words > 0:
            there, where = rng.sample(PLACES, 2)
            text = _pick(rng, FILLER).format(there=_pick(rng, WHERE[there]), where=_pick(rng, WHERE[where]))
            blocks[int(rng.random() * len(blocks))].append(Sentence(text, ()))
            num_words -= text.count(" ") + 1
        return Caption(tuple(sentence for block in blocks for sentence in block))

    def _empty(self, number: int) -> list[list[Sentence]]:
        out = []
        for i, place in enumerate(self.empty[:number]):
            rng = Random(self.seed + 200 + i)
            text = _pick(rng, EMPTY).format(where=_pick(rng, WHERE[place]))
            out.append([Sentence(text, (Fact("empty", "", place),))])
        return out


def _clause(thing: Thing, level: int, rng: Random) -> tuple[str, tuple[Fact, ...]]:
    where = _pick(rng, WHERE[thing.place][: 1 + level])
    if level == 0:
        facts = _facts(thing, "shape", "colour")
        return f"{_article(thing.colour)} {thing.colour} {thing.shape} {where}", facts
    return f"{_noun_phrase(thing, rng)} {where}", _facts(thing, "shape", "colour", "size", "fill")


def _thing(thing: Thing, level: int, style: str, rng: Random) -> list[Sentence]:
    where = _pick(rng, WHERE[thing.place])
    if level == 2:
        text = _pick(rng, WHOLE).format(a=_noun_phrase(thing, rng), where=where)
        return [Sentence(_capital(text), _facts(thing, "shape", "colour", "size", "fill"))]
    wordy = level == LAST_LEVEL
    text = _pick(rng, INTROS_WORDY if wordy else INTROS).format(shape=thing.shape, where=where)
    out = [Sentence(_capital(text), _facts(thing, "shape"))]
    words = {
        "colour": thing.colour,
        "size": _pick(rng, SIZE_WORDS[thing.size]),
        "fill": _pick(rng, FILL_WORDS[thing.fill]),
    }
    if level == 3:
        parts = [(TWO, ("colour", "size")), (FILL, ("fill",))]
    elif level == 4:
        parts = [(COLOUR, ("colour",)), (SIZE, ("size",)), (FILL, ("fill",))]
    else:
        parts = [(COLOUR_WORDY, ("colour",)), (SIZE_WORDY, ("size",)), (FILL_WORDY, ("fill",))]
    rng.shuffle(parts)
    for bank, kinds in parts:
        the = _pick(rng, IT) if style == "referring" else f"the {thing.shape} {_pick(rng, WHERE[thing.place])}"
        text = _pick(rng, bank).format(the=the, The=_capital(the), **words)
        out.append(Sentence(_capital(text), _facts(thing, *kinds)))
    return out


def _noun_phrase(thing: Thing, rng: Random) -> str:
    adjectives = [_pick(rng, SIZE_WORDS[thing.size]), _pick(rng, FILL_WORDS[thing.fill])]
    adjectives = [*adjectives[:: 1 if rng.random() < 0.5 else -1], thing.colour]
    phrase = " ".join([*adjectives, thing.shape])
    return f"{_article(phrase)} {phrase}"


def _facts(thing: Thing, *kinds: str) -> tuple[Fact, ...]:
    return tuple(Fact(kind, getattr(thing, kind), thing.place) for kind in kinds)


def _pick(rng: Random, bank: tuple[str, ...]) -> str:
    return bank[int(rng.random() * len(bank))]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def all_phrases() -> list[str]:
    """Returns phrases that contain every word of captions; `longalign.mini.tokenizers` makes vocabularies from them."""
    banks: list[tuple[str, ...]] = [GROUND_CLAUSES, GROUND_SENTENCES, GROUND_WORDY, WHOLE, INTROS, INTROS_WORDY, TWO]
    banks += [COLOUR, COLOUR_WORDY, SIZE, SIZE_WORDY, FILL, FILL_WORDY, EMPTY, IT]
    banks += [*WHERE.values(), *SIZE_WORDS.values(), *FILL_WORDS.values()]
    banks += [SHAPES, tuple(COLOURS), tuple(GROUNDS), tuple(SIZES), FILLS]
    return [phrase.replace("{", "").replace("}", "") for bank in banks for phrase in bank]
