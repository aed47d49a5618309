import time

import pytest

from longalign.encoders.bucketing import group_by_length
from longalign.registry import ConfigError, segmenters
from longalign.segmenters import (
    LongAlign,
    Manual,
    Packed,
    Sentence,
    Tokens,
    sentences,
    split_to_window,
)


def words(text: str) -> int:
    """Token counter: one token per four letters of a word, rounded up."""
    return sum((len(word) + 3) // 4 for word in text.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat. A dog! A bird?", ["A cat.", "A dog!", "A bird?"]),
        ("a cat on a mat. the sky is blue. an old tree", ["a cat on a mat.", "the sky is blue.", "an old tree"]),
        (
            "Mr. Smith met Dr. Lee, e.g. at St. Peter. They left.",
            ["Mr. Smith met Dr. Lee, e.g. at St. Peter.", "They left."],
        ),
        (
            "The U.S. Army came. He lives in the U.S. The end.",
            ["The U.S. Army came.", "He lives in the U.S.", "The end."],
        ),
        ("See No. 5. No. It is not.", ["See No. 5.", "No.", "It is not."]),
        ("Fig. 3 shows it, pp. 4 too. Next.", ["Fig. 3 shows it, pp. 4 too.", "Next."]),
        (
            "At 9 a.m. Monday we go. At 9 a.m. The sun rose. At 5 p.m. they ate.",
            ["At 9 a.m. Monday we go.", "At 9 a.m.", "The sun rose.", "At 5 p.m. they ate."],
        ),
        ("Pens, ink, etc. Next to it, pens etc. lie.", ["Pens, ink, etc.", "Next to it, pens etc. lie."]),
        (
            "A 3.5 m wall of $4.50. Version 2.0.1 is out. 5 dogs.",
            ["A 3.5 m wall of $4.50.", "Version 2.0.1 is out.", "5 dogs."],
        ),
        ("He is 5 ft. tall. He is 5 ft. The man stays.", ["He is 5 ft. tall.", "He is 5 ft.", "The man stays."]),
        (
            "J. R. R. Tolkien and J.R.R. Tolkien. Plan B. The end.",
            ["J. R. R. Tolkien and J.R.R. Tolkien.", "Plan B.", "The end."],
        ),
        ("Well... maybe. Well... The end. Wait … what?", ["Well... maybe.", "Well...", "The end.", "Wait … what?"]),
        ("Wait . . . what. Wait . . . What", ["Wait . . . what.", "Wait . . .", "What"]),
        ('"Stop!" he cried. He said "Go." Then he left.', ['"Stop!" he cried.', 'He said "Go."', "Then he left."]),
        ("“Hi. You.” She left. (A cat.) [A dog.] End.", ["“Hi. You.”", "She left.", "(A cat.)", "[A dog.]", "End."]),
        ('A sign reads "Stop. Go." in red. Next.', ['A sign reads "Stop. Go." in red.', "Next."]),
        ("A house (it is red. It is old.) stands. End.", ["A house (it is red. It is old.) stands.", "End."]),
        ('A 24" board. A 36" board. End.', ['A 24" board.', 'A 36" board.', "End."]),
        ('"I came. I saw."', ['"I came.', 'I saw."']),
        ("Really?! Yes!!! No.", ["Really?!", "Yes!!!", "No."]),
        (
            "1. A cat. 2. A dog.\n3) A bird\n- one\n* two. three",
            ["1. A cat.", "2. A dog.", "3) A bird", "- one", "* two.", "three"],
        ),
        ("iv. A cat. v. A dog.", ["iv. A cat.", "v. A dog."]),
        ("Items: • a cat • a dog. • a bird", ["Items:", "• a cat", "• a dog.", "• a bird"]),
        ("a cat sits\nA dog stands\r\n\r\nthe end", ["a cat sits", "A dog stands", "the end"]),
        (
            "A long line of text that was wrapped by an\neditor goes on. Next.",
            ["A long line of text that was wrapped by an editor goes on.", "Next."],
        ),
        ("It was Mr.\nSmith.", ["It was Mr. Smith."]),
        ("今天天气很好。我们去公园！好吗？是；对", ["今天天气很好。", "我们去公园！", "好吗？", "是；", "对"]),
        ("他说「你好。再见。」然后走了。好", ["他说「你好。再见。」", "然后走了。", "好"]),
        ("高３．５米。好.再见!好", ["高３．５米。", "好.", "再见!", "好"]),
        ("A tall tree.The sky is blue.A dog", ["A tall tree.", "The sky is blue.", "A dog"]),
        (
            "Visit www.Example.com or a.JPG. Then e.g.this. End",
            ["Visit www.Example.com or a.JPG.", "Then e.g.this.", "End"],
        ),
        ("... and then. !!", ["... and then. !!"]),
        ("?!", ["?!"]),
        (
            "Ph.D. Smith works at Acme Inc. He is tall. Acme Inc. sells.",
            ["Ph.D. Smith works at Acme Inc.", "He is tall.", "Acme Inc. sells."],
        ),
        ("It opened on Jan. 5. We came on Mon. morning.", ["It opened on Jan. 5.", "We came on Mon. morning."]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_sentences_splits_at(text, expected):
    assert sentences(text) == expected
    assert "".join("".join(expected).split()) == "".join(text.split())


def test_sentences_keeps_all_characters():
    alphabet = ["a", "B", " ", ".", "!", '"', "(", ")", "\n", "1", "。", "…", "Mr", "- ", "“", "”", ";", "•"]
    state = 1
    for _ in range(400):
        text = ""
        for _ in range(25):
            state = (state * 1103515245 + 12345) % 2**31
            text += alphabet[(state >> 16) % len(alphabet)]
        assert "".join("".join(sentences(text)).split()) == "".join(text.split())
        assert all(s == s.strip() and s for s in sentences(text))


def test_sentences_splits_inside_long_quotation():
    inner = " ".join(["A cat sits here."] * 30)
    assert len(sentences(f'He said: "{inner}" End.')) == 31


@pytest.mark.parametrize(
    "text",
    ["U.S. ", "a" * 40000, "[", '("Ab.") ', "! ", "1.", "a.", "Ab.Cd", '"', "。", "( . ", " • a", "Mr.\n", "a!"],
)
def test_sentences_time_is_linear(text):
    whole = text * (40000 // len(text)) + ")" * 20000 + " a. B"
    start = time.process_time()
    segments = sentences(whole)
    assert time.process_time() - start < 3  # quadratic time would take 10 s to minutes
    assert "".join("".join(segments).split()) == "".join(whole.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two. ", ["One.", " Two.", " ."]),
        ("A 3.5 m wall", ["A 3.", "5 m wall."]),
        ('Say "go"! Is "x;" it? Stop! No; end', ['Say "go.', ' Is "x.', " it.", " Stop! No; end."]),
        ("..", []),
        ("", []),
    ],
)
def test_longalign_segmenter_matches_published(text, expected):
    assert LongAlign()(text, words) == expected


def test_tokens_segmenter_packs_whole_words():
    assert Tokens(3)("a b c d. e f g", words) == ["a b c", "d. e f", "g"]
    assert Tokens(2)("ab abcdefghijklm yz", words) == ["ab", "abcdefgh", "ijklm", "yz"]


def test_packed_segmenter_keeps_sentences_whole():
    assert Packed(4)("A b. C d. E f g. H i j k l m. N.", words) == ["A b. C d.", "E f g.", "H i j k l m.", "N."]


def test_manual_segmenter_takes_marker_or_list():
    assert Manual("BREAK")("a. b BREAK c BREAKFAST\nBREAK", words) == ["a. b", "c BREAKFAST"]
    assert Manual("|")("a|b", words) == ["a", "b"]
    assert Manual("BREAK")(["a BREAK b", " ", "c"], words) == ["a BREAK b", "c"]


def test_segmenters_reject_list_except_manual():
    for segmenter in (Sentence(), LongAlign(), Tokens(75), Packed(75)):
        with pytest.raises(ValueError, match=f"'{type(segmenter).__name__.lower()}'.*got a list.*'manual'"):
            segmenter(["a", "b"], words)


def test_split_to_window_prefers_clauses_then_words_then_characters():
    assert split_to_window(["a b c, d e f, g h", "x y"], 7, words) == ["a b c, d e f,", "g h", "x y"]
    assert split_to_window(["a b c d e"], 2, words) == ["a b", "c d", "e"]
    assert split_to_window(["abcdefghijklmnopq z"], 2, words) == ["abcdefgh", "ijklmnop", "q z"]
    assert split_to_window(["红的，蓝的，绿的"], 6, len) == ["红的，蓝的，", "绿的"]


def test_split_to_window_keeps_fitting_segments_unchanged():
    assert split_to_window([" a b ", " ."], 2, words) == [" a b ", " ."]


def test_split_to_window_keeps_combining_mark_with_letter():
    assert split_to_window(["abe\u0301d"], 3, len) == ["ab", "e\u0301d"]


def test_split_to_window_tokenizes_little_of_long_text():
    seen = []

    def count(text):
        seen.append(len(text))
        return words(text)

    pieces = split_to_window([" ".join(["word"] * 3000)], 50, count)
    assert [words(piece) for piece in pieces] == [50] * 60
    assert sum(seen) < 60 * 20 * 64 * 5 + 15000


@pytest.mark.parametrize("text", ["a" * 40000, "好" * 40000, "word " * 8000, "a" + " " * 40000 + "b"])
def test_split_to_window_tokenizes_bounded_number_of_times(text):
    counted = []

    def count(piece):
        counted.append(len(piece))
        return len(piece.encode()) - piece.count(" ")

    segments = split_to_window([text], 75, count)
    assert "".join("".join(segments).split()) == "".join(text.split())
    assert sum(counted) < 100 * len(text)


def test_split_to_window_splits_excess_combining_marks():
    text = "a" + "\u0301" * 1000 + "b"
    segments = split_to_window([text], 75, len)
    assert "".join(segments) == text and max(map(len, segments)) <= 75


def test_split_to_window_rejects_too_small_window():
    with pytest.raises(ValueError, match=r"window of 2 .*'红' \(3 tokens\)"):
        split_to_window(["红"], 2, lambda text: 3 * len(text))
    with pytest.raises(ValueError, match=r"window.* 1 token, got 0"):
        split_to_window(["a b"], 0, words)


def test_segmenters_build_from_name_or_config():
    assert segmenters.build("sentence")("A. Smith. B", words) == ["A. Smith.", "B"]
    assert segmenters.build("longalign")("a. b", words) == ["a.", " b."]
    assert segmenters.build({"name": "tokens", "n": 2})("a b c", words) == ["a b", "c"]
    assert segmenters.build({"name": "packed", "n": 9})("A. B? C", words) == ["A. B? C"]
    assert segmenters.build({"name": "manual", "marker": "AND"})("a AND b", words) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"\bn: .*\b1\b"):
        segmenters.validate({"name": "tokens", "n": 0})


@pytest.mark.parametrize(
    ("call_cost", "expected"),
    [(0, [[1], [3], [0, 2], [4]]), (2, [[1, 3], [0, 2], [4]]), (3, [[1, 3, 0, 2], [4]]), (100, [[1, 3, 0, 2, 4]])],
)
def test_group_by_length_pads_only_below_call_cost(call_cost, expected):
    assert group_by_length([5, 3, 5, 4, 9], limit=100, call_cost=call_cost) == expected


def test_group_by_length_keeps_limit():
    assert group_by_length([4] * 7, limit=13) == [[0, 1], [2, 3], [4, 5, 6]]
    assert group_by_length([30, 20], limit=13) == [[1], [0]]
    assert group_by_length([], limit=13) == []


def test_group_by_length_minimises_cost():
    def cost(groups, lengths):
        return sum(max(lengths[i] for i in group) * len(group) + 7 for group in groups)

    lengths = [12, 1, 7, 3, 8, 8, 2, 11]
    order = sorted(range(8), key=lengths.__getitem__)
    cuts = [[i for i in range(1, 8) if mask >> (i - 1) & 1] for mask in range(128)]
    groupings = [[order[a:b] for a, b in zip([0, *c], [*c, 8], strict=True)] for c in cuts]
    min_cost = min(cost(groups, lengths) for groups in groupings)
    assert cost(group_by_length(lengths, limit=1000, call_cost=7), lengths) == min_cost
