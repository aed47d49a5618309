"""Scenes, captions and oracle of the small world."""

from __future__ import annotations

import re

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from longalign.mini import oracle
from longalign.mini.captions import Caption, Fact, Sentence, describe
from longalign.mini.scenes import PLACES, Scene, Thing, render, render_batch, sample_scene

HAND = Scene(
    (Thing("top left", "circle", "red", "large", "solid"), Thing("right", "cross", "yellow", "small", "hollow")), "navy"
)


def scenes(count: int, things: tuple[int, int] = (1, 9), seed: int = 0) -> list[Scene]:
    return [sample_scene(np.random.default_rng([seed, i]), things) for i in range(count)]


def test_rendering_puts_colours_where_the_scene_says():
    image = render(HAND)
    assert image.shape == (64, 64, 3)
    np.testing.assert_allclose(image[10, 10], [0.86, 0.12, 0.12], atol=1e-6)
    np.testing.assert_allclose(image[32, 32], [0.05, 0.08, 0.32], atol=1e-6)
    warm = render(Scene(HAND.things, "navy", tint=1.0))
    assert warm[10, 10, 0] > image[10, 10, 0]
    assert render(Scene(HAND.things, "navy", vignette=1.0))[0, 0].sum() < image[0, 0].sum()
    assert render_batch([HAND]).shape == (1, 3, 64, 64)


def test_sampling_keeps_the_number_of_objects_and_is_repeatable():
    assert {len(s.things) for s in scenes(60, (2, 4))} == {2, 3, 4}
    assert scenes(3) == scenes(3)
    for bad in ((3, 2), (0, 10), (-1, 2)):
        with pytest.raises(ValueError, match="num_things must be a range within 0 and 9"):
            sample_scene(np.random.default_rng(0), bad)


def test_the_oracle_reads_a_hand_made_scene_exactly():
    (read,) = oracle.read(render_batch([HAND]))
    assert read == HAND
    (nothing,) = oracle.read(render_batch([Scene((), "brown", 0.5, 0.5)]))
    assert nothing == Scene((), "brown")


def test_the_oracle_is_right_on_true_renders_under_any_look_and_some_noise():
    drawn = scenes(200)
    captions = [describe(s, np.random.default_rng(1), words=120) for s in drawn]
    images = render_batch(drawn)
    assert oracle.fact_accuracy(images, captions).mean() >= 0.995
    noisy = images + np.random.default_rng(0).normal(0, 0.03, images.shape).astype(np.float32)
    assert oracle.fact_accuracy(noisy.clip(0, 1), captions).mean() >= 0.99


def test_verdicts_are_false_where_the_image_differs():
    caption = Caption(
        (
            Sentence("one", (Fact("shape", "circle", "top left"), Fact("colour", "blue", "top left"))),
            Sentence("two", (Fact("empty", "", "centre"), Fact("empty", "", "right"))),
            Sentence("three", (Fact("ground", "navy"), Fact("size", "small", "bottom"))),
        )
    )
    assert oracle.verdicts(render_batch([HAND]), [caption]) == [[[True, False], [True, False], [True, False]]]
    np.testing.assert_allclose(oracle.fact_accuracy(render_batch([HAND]), [caption]), [0.5])
    with pytest.raises(ValueError, match="one caption per image"):
        oracle.verdicts(render_batch([HAND]), [])
    with pytest.raises(ValueError, match=r"shape \(b, 3, 64, 64\)"):
        oracle.read(np.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("style", ["plain", "referring"])
@pytest.mark.parametrize("words", [8, 30, 100, 250, 480])
def test_every_fact_told_is_true_and_the_length_is_met(style: str, words: int):
    for i, scene in enumerate(scenes(20, (7, 9))):
        caption = describe(scene, np.random.default_rng(i), words=words, style=style)
        assert all(oracle.holds(fact, scene) for fact in caption.facts)
        assert len(caption.facts) == len(set(caption.facts))
        assert caption.num_words == len(caption.text.split())
        if words >= 100 and caption.num_words < words:
            assert {f.place for f in caption.facts} >= set(PLACES)  # nothing is left that could be told
        assert caption.num_words < words + 70  # one object more fully told
        assert re.fullmatch(r"([A-Z][^.]*\. )*[A-Z][^.]*\.", caption.text)


def test_captions_go_from_under_ten_words_to_over_five_hundred_tokens():
    clip = SimpleTokenizer()
    for i, scene in enumerate(scenes(20, (7, 9), seed=3)):
        short = describe(scene, np.random.default_rng(i), words=9)
        assert short.num_words < 10
        assert {f.kind for f in short.facts} == {"shape", "colour"}
        assert len(clip.encode(describe(scene, np.random.default_rng(i), words=480).text)) > 500


def test_the_same_facts_can_be_told_short_and_long():
    for i, scene in enumerate(scenes(10, (3, 3))):
        short = describe(scene, np.random.default_rng(i), words=38)
        long = describe(scene, np.random.default_rng(i), words=130)
        assert set(short.facts) <= set(long.facts)
        assert len(set(long.facts) - set(short.facts)) <= 1  # the ground
        assert long.num_words > 2 * short.num_words


def test_plain_sentences_name_their_object_and_referring_ones_do_not():
    scene = scenes(1, (5, 5))[0]
    plain = describe(scene, np.random.default_rng(0), words=150)
    for sentence in plain.sentences:
        for fact in sentence.facts:
            if fact.place:
                thing = scene.at(fact.place)
                assert thing is not None
                assert thing.shape in sentence.text
    referring = describe(scene, np.random.default_rng(0), words=120, style="referring")
    assert re.search(r"\b([Ii]t|[Tt]his one|[Tt]his object)\b", referring.text)
    assert not re.search(r"\b(this one|this object)\b", plain.text)


def test_phrases_vary_with_the_generator_only():
    scene = scenes(1, (4, 4))[0]
    captions = {describe(scene, np.random.default_rng(i), words=80).text for i in range(10)}
    assert len(captions) == 10
    assert describe(scene, np.random.default_rng(3)).text == describe(scene, np.random.default_rng(3)).text


@pytest.mark.parametrize(("words", "sentences"), [(1, 2), (200, 10)])
def test_a_scene_without_objects_is_told_by_its_ground_and_its_empty_places(words, sentences):
    caption = describe(Scene((), "teal"), np.random.default_rng(0), words=words)
    assert caption.facts[0] == Fact("ground", "teal") and len(caption.sentences) == sentences
    assert {fact.kind for fact in caption.facts[1:]} == {"empty"}
    assert len({fact.place for fact in caption.facts[1:]}) == sentences - 1


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="style must be one of plain, referring, got 'poem'"):
        describe(HAND, np.random.default_rng(0), style="poem")
    with pytest.raises(ValueError, match="words must be at least 1, got 0"):
        describe(HAND, np.random.default_rng(0), words=0)
