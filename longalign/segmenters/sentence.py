"""Rule-based sentence splitting: abbreviations, numbers, initials, quotes, lists, line breaks, CJK."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# titles before a name; their period never ends a sentence
_TITLES = _words(
    "mr mrs ms mx dr prof rev fr gen col maj capt cpl sgt lt adm cmdr gov sen rep hon pres mt messrs mme mlle mgr"
)
# abbreviations whose period never ends a sentence
_NEVER = _words("e.g i.e eg ie vs viz cf ca approx resp incl esp excl")
# abbreviations before a number: "No. 5", "Fig. 3", "pp. 4"
_NUMBERED = _words("no nos fig figs vol vols pp p ch sec eq eqs op pt nr ver ref")
# abbreviations that end a sentence only before a typical first word (`_STARTERS`)
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
_END_MARK = re.compile(rf"(?:\.(?:\s\.){{2,}}|[.!?…‼⁇⁈⁉{_WIDE}]+)(?P<closers>{_CLOSERS})")
_RUN = re.compile(r"\S+")
_NON_SPACE = re.compile(r"\S")
_NO_OPENER = re.compile(rf"[^{_OPENERS}]")
_NEXT_WORD = re.compile(rf"[{_OPENERS}]*(\S*)")
_ACRONYM = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")
_JOINED = re.compile(r"[A-Z][a-z']*(?=[\s,])")
_MARKER = re.compile(r"\(?(?:\d{1,3}|[A-Za-z]|(?=[ivx])x{0,3}(?:ix|iv|v?i{0,3}))")
_ITEM = re.compile(r"\s*(?:[-*+•●▪‣◦–—]\s|\(?(?:\d{1,3}|[A-Za-z]|[ivx]{1,4})[.)]\s|#+\s)")
_BULLET = re.compile(r"\s(?=[•●▪‣◦]\s)")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uff66-\uff9f]")
_PAIRS = dict(zip(")]}”»」』）】》〉", "([{“«「『（【《〈", strict=True))
_OPENING = frozenset(_PAIRS.values())
_WORD = re.compile(r"\w")

_WRAPPED = 40
"""Minimum length in characters of a wrapped line: if the next line starts in lower case, the sentence continues."""
_LONG_QUOTE = 300
"""A quotation or bracket of at most this many characters is not split inside."""
_LONGEST_MARKER = len("(xxxviii")


def sentences(text: str) -> list[str]:
    """Splits a text into sentences.

    A period, question mark or exclamation mark ends a sentence. Exceptions: abbreviations (Mr., e.g., U.S., No. 5,
    a.m.), numbers, initials, list markers, ellipses, and quotations within a sentence. Closing quotes and brackets
    stay with their sentence; a text in quotes or brackets of up to 300 characters is not split. A line break ends a
    sentence unless the line has at least 40 characters and the next line starts in lower case (wrapped text). The wide
    marks of Chinese and Japanese, 。！？；, end a sentence even without a following space. The time is linear in the
    length of the text.

    Returns:
        Stripped, non-empty sentences. Together they contain all characters of the text except whitespace.
    """
    return [sentence for block in _blocks(text) for sentence in _split(block)]


def _blocks(text: str) -> list[str]:
    """Returns the lines of a text, with wrapped lines joined."""
    blocks: list[list[str]] = []
    last = ""
    for line in map(str.strip, text.splitlines()):
        if last and line and not _ITEM.match(line) and _is_continued(last, line):
            blocks[-1].append(line)
        elif line:
            blocks.append([line])
        last = line
    return [" ".join(lines) for lines in blocks]


def _is_continued(line: str, following: str) -> bool:
    if len(line) >= _WRAPPED and following[0].islower():
        return True
    return line.endswith(".") and line.split()[-1][:-1].lower() in _TITLES | _NEVER


def _split(block: str) -> list[str]:
    out: list[str] = []
    start = seen = 0
    for end in _boundaries(block):
        has_word = _WORD.search(block, seen, end)
        seen = end
        if has_word:
            out.append(block[start:end].strip())
            start = end
    rest = block[start:].strip()
    if rest and out and not _WORD.search(rest):
        out[-1] = f"{out[-1]} {rest}"
    elif rest:
        out.append(rest)
    return out


def _boundaries(block: str) -> Iterator[int]:
    scan = _Scan(block)
    bullets = deque(match.end() for match in _BULLET.finditer(block))
    for mark in _END_MARK.finditer(block):
        while bullets and bullets[0] <= mark.start():
            yield scan.begin(bullets.popleft())
        if scan.ends(mark) and not scan.enclosed(mark):
            yield scan.begin(mark.end())
    yield from bullets


def _enclosures(block: str) -> list[tuple[int, int]]:
    """Returns the character offsets ``(open, close)`` of short quotations and brackets. Inch marks are not quotes."""
    spans: list[tuple[int, int]] = []
    stack: list[tuple[str, int]] = []
    open_marks: Counter[str] = Counter()
    for i, char in enumerate(block):
        opener = _PAIRS.get(char)
        if char == '"' and open_marks['"']:
            opener = '"'
        elif char in _OPENING or (char == '"' and not (i > 0 and block[i - 1].isdigit())):
            stack.append((char, i))
            open_marks[char] += 1
        while opener and open_marks[opener]:
            mark, position = stack.pop()
            open_marks[mark] -= 1
            if mark == opener:
                spans.append((position, i))
                break
    whole = (0, len(block) - 1)
    return [span for span in spans if span != whole and span[1] - span[0] <= _LONG_QUOTE]


class _Scan:
    """Decides, in one pass over a text, which punctuation marks end a sentence.

    The methods must be called with ascending positions (character offsets), so that the time is linear.

    Args:
        block: the text, without line breaks.
    """

    def __init__(self, block: str):
        self.block = block
        self.enclosures = deque(sorted(_enclosures(block)))
        self.enclosed_to = -1  # largest end of the enclosures opened so far
        self.runs = _RUN.finditer(block)
        self.run = next(self.runs, None)  # run of non-space characters that contains the current mark
        self.word = 0  # start of the word before the current mark
        self.mark_end = 0  # end of the previous mark
        self.begin(0)

    def begin(self, start: int) -> int:
        """Starts a sentence at the offset ``start``, and returns ``start``."""
        self.start = start
        match = _NON_SPACE.search(self.block, start)
        self.first_char = match.start() if match else len(self.block)
        return start

    def enclosed(self, mark: re.Match[str]) -> bool:
        """Whether the punctuation mark, a match of ``_END_MARK``, is inside quotation marks or brackets."""
        while self.enclosures and self.enclosures[0][0] < mark.start():
            self.enclosed_to = max(self.enclosed_to, self.enclosures.popleft()[1])
        return self.enclosed_to >= mark.end()

    def ends(self, mark: re.Match[str]) -> bool:
        """Whether the punctuation mark, a match of ``_END_MARK``, ends the current sentence.

        Does not consider quotations and brackets; see `enclosed`.
        """
        block, at, after = self.block, mark.start(), mark.end()
        while self.run and self.run.end() <= at:
            self.run = next(self.runs, None)
        self.word = max(self.word, self.start, self.run.start() if self.run else at)
        match = _NO_OPENER.search(block, self.word, at)
        self.word = match.start() if match else at
        other_marks, self.mark_end = self.word < self.mark_end, after
        if after == len(block):
            return False
        marks = mark.group().removesuffix(mark["closers"])
        if any(char in _WIDE for char in marks):
            return not (marks == "．" and block[at - 1 : at].isdigit() and block[after].isdigit())
        if not block[after].isspace():
            return self._ends_joined(marks, at, after, other_marks)
        following = _NEXT_WORD.match(block, after)[1]  # type: ignore[index]
        if not following:
            return True
        if following[0] in ",;:)]}%":
            return False
        if following[0].islower() and (mark["closers"] or marks.count(".") > 1 or "…" in marks):
            return False
        if marks != "." or mark["closers"]:
            return True
        if at - self.first_char <= _LONGEST_MARKER and _MARKER.fullmatch(block, self.first_char, at):
            return False
        return _ends_at_word(block[self.word : at], block, self.word, following)

    def _ends_joined(self, marks: str, at: int, after: int, other_marks: bool) -> bool:
        """Whether a punctuation mark without a following space ends a sentence.

        For example, ``a tree.The sky`` is split, but ``3.5`` and ``a.JPG`` are not. ``marks`` is the mark without
        closing quotes; it starts at offset ``at`` and, with them, ends at ``after``. ``other_marks``: whether the word
        before contains another mark.
        """
        block = self.block
        if self.word == at:
            return False
        if _CJK.match(block, at - 1) and _CJK.match(block, after):
            return True
        if other_marks or not block[at - 1].islower() or not (marks == "." or not set(marks) - set("!?")):
            return False
        word = block[self.word : at]
        plain = len(word) > 1 and word.isalpha() and word.lower() not in _TITLES | _NEVER | _NUMBERED
        return plain and bool(_JOINED.match(block, after))


def _ends_at_word(word: str, block: str, start: int, following: str) -> bool:
    """Whether the period after ``word`` ends a sentence.

    ``word`` starts at offset ``start`` of ``block``; after the period come a space and the word ``following``.
    """
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
    if key in _UNITS and _follows_number(block, start):
        return not lower
    if key in _CALENDAR and word[0].isupper() and len(word) <= 5:
        return not (lower or following[0].isdigit())
    if key in _MAY_END or _ACRONYM.fullmatch(word) or (len(word) == 1 and word.isupper()):
        return starter
    return True


def _follows_number(block: str, position: int) -> bool:
    while position and block[position - 1].isspace():
        position -= 1
    return block[position - 1 : position].isdecimal()
