"""Splitting text into sentences by rules: abbreviations, numbers, initials, quotes, lists, line breaks, CJK."""

from __future__ import annotations

import re
from collections.abc import Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# before a name: the stop never ends a sentence
_TITLES = _words(
    "mr mrs ms mx dr prof rev fr gen col maj capt cpl sgt lt adm cmdr gov sen rep hon pres mt messrs mme mlle mgr"
)
# a stop after these never ends a sentence, whatever follows
_NEVER = _words("e.g i.e eg ie vs viz cf ca approx resp incl esp excl")
# before a number: "No. 5", "Fig. 3", "pp. 4"
_NUMBERED = _words("no nos fig figs vol vols pp p ch sec eq eqs op pt nr ver ref")
# these may end a sentence, and do before a word that starts sentences
_MAY_END = _words("st sr jr inc ltd co corp bros ave blvd rd dept est ft bldg univ assn ph.d m.d b.a m.a misc orig")
_UNITS = _words("in ft yd mi mm cm km m kg g mg lb lbs oz hr hrs min sec sq gal pt qt deg")
_CALENDAR = _words(
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri sat sun "
    "january february march april may june july august september october november december "
    "monday tuesday wednesday thursday friday saturday sunday"
)
_STARTERS = _words(
    "the a an this that these those it its he she they we you i his her their our my your there here in on at by "
    "and but or so when while if as to from with behind above below under next near another each every both all "
    "some many most one two three four five several no not nearby meanwhile however then after before during "
    "overhead beside between inside outside around across beneath what who where why how for let"
)

_OPENERS = r"""\s"'“‘«„(\[{¿¡「『（【《〈—–-"""
_CLOSERS = r"""["'”’»)\]}」』）】》〉]*"""
_WIDE = "。！？；｡．؟۔।॥"
_STOP = re.compile(rf"(?:\.(?:\s\.){{2,}}|[.!?…‼⁇⁈⁉{_WIDE}]+)(?P<closers>{_CLOSERS})")
_LAST_WORD = re.compile(rf"[^{_OPENERS}][^\s]*$|[^{_OPENERS}]+$")
_NEXT_WORD = re.compile(rf"[{_OPENERS}]*(\S*)")
_ACRONYM = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")
_JOINED = re.compile(r"[A-Z][a-z']*(?=[\s,])")
_MARKER = re.compile(r"\s*\(?(?:\d{1,3}|[A-Za-z]|(?=[ivx])x{0,3}(?:ix|iv|v?i{0,3}))")
_ITEM = re.compile(r"\s*(?:[-*+•●▪‣◦–—]\s|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]\s|#+\s)")
_BULLET = re.compile(r"\s(?=[•●▪‣◦]\s)")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff66-\uff9f]")
_PAIRS = dict(zip(")]}”»」』）】》〉", "([{“«「『（【《〈", strict=True))

_WRAPPED = 40
"""Lines of at least this length may be wrapped text: the next line goes on if it starts in lower case."""
_LONG_QUOTE = 300
"""A quotation or bracket longer than this is split inside; a shorter one is kept whole."""


def sentences(text: str) -> list[str]:
    """Splits a text into sentences.

    A stop ends a sentence unless it belongs to an abbreviation (Mr., e.g., U.S., No. 5, a.m.), a number, an initial,
    a list marker, an ellipsis or a quotation that goes on. Closing quotes and brackets stay with the sentence that
    they close, short quotations and brackets are not split inside. A line break ends a sentence unless the line is
    long and the next one starts in lower case (wrapped text). Full-width stops 。！？； end sentences without a blank.

    Returns:
        Stripped, non-empty sentences. Nothing but whitespace is lost: joined, they give the text's other characters.
    """
    return [sentence for block in _blocks(text) for sentence in _split(block)]


def _blocks(text: str) -> list[str]:
    """Lines, wrapped ones joined."""
    blocks: list[str] = []
    last = ""
    for line in map(str.strip, text.splitlines()):
        if last and line and not _ITEM.match(line) and _goes_on(last, line):
            blocks[-1] += " " + line
        elif line:
            blocks.append(line)
        last = line
    return blocks


def _goes_on(line: str, following: str) -> bool:
    if len(line) >= _WRAPPED and following[0].islower():
        return True
    return line.endswith(".") and line.split()[-1][:-1].lower() in _TITLES | _NEVER


def _split(block: str) -> list[str]:
    out: list[str] = []
    start = 0
    for end in _boundaries(block):
        piece = block[start:end].strip()
        if not re.search(r"\w", piece):
            continue
        out.append(piece)
        start = end
    rest = block[start:].strip()
    if rest and out and not re.search(r"\w", rest):
        out[-1] = f"{out[-1]} {rest}"
    elif rest:
        out.append(rest)
    return out


def _boundaries(block: str) -> Iterator[int]:
    enclosed = _enclosures(block)
    bullets = [match.end() for match in _BULLET.finditer(block)]
    start = 0
    for stop in _STOP.finditer(block):
        while bullets and bullets[0] <= stop.start():
            start = bullets.pop(0)
            yield start
        inside = any(a < stop.start() and b >= stop.end() for a, b in enclosed)
        if not inside and stop.end() < len(block) and _ends(block, start, stop):
            start = stop.end()
            yield start
    yield from bullets


def _enclosures(block: str) -> list[tuple[int, int]]:
    """Quotations and brackets as ``(open, close)`` positions; unbalanced marks, long ones and inches do not count."""
    found: list[tuple[int, int]] = []
    stack: list[tuple[str, int]] = []
    for i, char in enumerate(block):
        opener = _PAIRS.get(char)
        if char == '"':
            inch = i > 0 and block[i - 1].isdigit()
            opener = '"' if any(c == '"' for c, _ in stack) else None
            if opener is None and not inch:
                stack.append(('"', i))
        elif char in _PAIRS.values():
            stack.append((char, i))
        if opener and any(c == opener for c, _ in stack):
            while stack[-1][0] != opener:
                stack.pop()
            found.append((stack.pop()[1], i))
    whole = (0, len(block) - 1)
    return [span for span in found if span != whole and span[1] - span[0] <= _LONG_QUOTE]


def _ends(block: str, start: int, stop: re.Match[str]) -> bool:
    """Whether a stop ends the sentence that began at ``start``; something follows it in the block."""
    marks = stop.group().removesuffix(stop["closers"])
    before, after = block[: stop.start()], block[stop.end() :]
    if any(mark in _WIDE for mark in marks):
        return not (marks == "．" and before[-1:].isdigit() and after[0].isdigit())
    found = _LAST_WORD.search(before[start:])
    word = found.group() if found else ""
    if not after[0].isspace():
        return _ends_joined(marks, word, after)
    following = _NEXT_WORD.match(after)[1]  # type: ignore[index]
    if not following:
        return True
    if following[0] in ",;:)]}%":
        return False
    lower = following[0].islower()
    if lower and (stop["closers"] or marks.count(".") > 1 or "…" in marks):
        return False
    if marks != "." or stop["closers"]:
        return True
    if _MARKER.fullmatch(block[start : stop.start()]):
        return False
    return _ends_at_word(word, before, following)


def _ends_joined(marks: str, word: str, after: str) -> bool:
    """No blank after the stop, as between joined paragraphs: ``a tree.The sky``; not ``3.5`` or ``a.JPG``."""
    if word and _CJK.match(word[-1]) and _CJK.match(after[0]):
        return True
    plain = len(word) > 1 and word.isalpha() and word[-1].islower() and word.lower() not in _TITLES | _NEVER | _NUMBERED
    return plain and (marks == "." or not set(marks) - set("!?")) and bool(_JOINED.match(after))


def _ends_at_word(word: str, before: str, following: str) -> bool:
    """The rules for one stop after ``word`` and before a blank and ``following``."""
    key = word.lower()
    name = following.rstrip(",;:!?…\"'”’)")
    starter = name[:1].isupper() and name.lower() in _STARTERS
    lower = following[0].islower()
    if key in _TITLES or key in _NEVER:
        return False
    if key in ("a.m", "p.m"):
        acronym = len(name) > 1 and name.isupper()
        return not lower and not acronym and name.rstrip(".").lower() not in _CALENDAR
    if key in _NUMBERED and following[0].isdigit():
        return False
    if key in _NUMBERED and key != "no" and re.fullmatch(r"[A-Z]|[IVXLC]+", name):
        return False
    if key == "etc":
        return not lower
    if key in _UNITS and re.search(r"\d\s*$", before[: -len(word)]):
        return not lower
    if key in _CALENDAR and word[0].isupper() and len(word) <= 5:
        return not (lower or following[0].isdigit())
    if key in _MAY_END or _ACRONYM.fullmatch(word) or (len(word) == 1 and word.isupper()):
        return starter
    return True
