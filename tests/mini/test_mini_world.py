"""Rendering, captions and oracle of the synthetic scenes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer

from longalign.mini import oracle
from longalign.mini.captions import Caption, Fact, Sentence, all_phrases, describe
from longalign.mini.scenes import PLACES, Scene, Thing, render, render_batch, sample_scene

HAND = Scene(
    (Thing("top left", "circle", "red", "large", "solid"), Thing("right", "cross", "yellow", "small", "hollow")), "navy"
)


def scenes(count: int, things: tuple[int, int] = (1, 9), seed: int = 0) -> list[Scene]:
    return [sample_scene(np.random.default_rng([seed, i]), things) for i in range(count)]


def test_render_places_colours_and_look():
    image = render(HAND)
    assert image.shape == (64, 64, 3)
    np.testing.assert_allclose(image[10, 10], [0.86, 0.12, 0.12], atol=1e-6)
    np.testing.assert_allclose(image[32, 32], [0.05, 0.08, 0.32], atol=1e-6)
    warm = render(Scene(HAND.things, "navy", tint=1.0))
    assert warm[10, 10, 0] > image[10, 10, 0]
    assert render(Scene(HAND.things, "navy", vignette=1.0))[0, 0].sum() < image[0, 0].sum()
    assert render_batch([HAND]).shape == (1, 3, 64, 64)


def test_sample_scene_respects_object_counts_and_seed():
    assert {len(s.things) for s in scenes(60, (2, 4))} == {2, 3, 4}
    assert scenes(3) == scenes(3)
    for bad in ((3, 2), (0, 10), (-1, 2)):
        with pytest.raises(ValueError, match=r"num_things.*9.*\("):
            sample_scene(np.random.default_rng(0), bad)


def test_read_scenes_recovers_a_handmade_scene():
    (recovered,) = oracle.read_scenes(render_batch([HAND]))
    assert recovered == HAND
    (nothing,) = oracle.read_scenes(render_batch([Scene((), "brown", 0.5, 0.5)]))
    assert nothing == Scene((), "brown")


def test_fact_accuracy_of_renders_with_looks_and_noise():
    sampled = scenes(200)
    captions = [describe(s, np.random.default_rng(1), words=120) for s in sampled]
    images = render_batch(sampled)
    assert oracle.fact_accuracy(images, captions).mean() >= 0.995
    noisy = images + np.random.default_rng(0).normal(0, 0.03, images.shape).astype(np.float32)
    assert oracle.fact_accuracy(noisy.clip(0, 1), captions).mean() >= 0.99


def test_verdicts_are_false_for_wrong_facts():
    caption = Caption(
        (
            Sentence("one", (Fact("shape", "circle", "top left"), Fact("colour", "blue", "top left"))),
            Sentence("two", (Fact("empty", "", "centre"), Fact("empty", "", "right"))),
            Sentence("three", (Fact("ground", "navy"), Fact("size", "small", "bottom"))),
        )
    )
    assert oracle.verdicts(render_batch([HAND]), [caption]) == [[[True, False], [True, False], [True, False]]]
    np.testing.assert_allclose(oracle.fact_accuracy(render_batch([HAND]), [caption]), [0.5])
    with pytest.raises(ValueError, match="got 1 images and 0 captions"):
        oracle.verdicts(render_batch([HAND]), [])
    with pytest.raises(ValueError, match=r"shape \(b, 3, 64, 64\)"):
        oracle.read_scenes(np.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize("style", ["plain", "referring"])
@pytest.mark.parametrize("words", [8, 30, 100, 250, 480])
def test_describe_gives_true_facts_and_target_length(style: str, words: int):
    for i, scene in enumerate(scenes(20, (7, 9))):
        caption = describe(scene, np.random.default_rng(i), words=words, style=style)
        assert all(oracle.holds(fact, scene) for fact in caption.facts)
        assert len(caption.facts) == len(set(caption.facts))
        assert caption.num_words == len(caption.text.split())
        if words >= 100 and caption.num_words < words:
            assert {f.place for f in caption.facts} >= set(PLACES)  # every place is described
        assert caption.num_words < words + 70  # one step adds detail to one object
        assert re.fullmatch(r"([A-Z][^.]*\. )*[A-Z][^.]*\.", caption.text)


def test_describe_from_under_10_words_to_over_500_tokens():
    clip = SimpleTokenizer()
    for i, scene in enumerate(scenes(20, (7, 9), seed=3)):
        short = describe(scene, np.random.default_rng(i), words=9)
        assert short.num_words < 10
        assert {f.kind for f in short.facts} == {"shape", "colour"}
        assert len(clip.encode(describe(scene, np.random.default_rng(i), words=480).text)) > 500


def test_describe_short_and_long_with_the_same_facts():
    for i, scene in enumerate(scenes(10, (3, 3))):
        short = describe(scene, np.random.default_rng(i), words=38)
        long = describe(scene, np.random.default_rng(i), words=130)
        assert set(short.facts) <= set(long.facts)
        assert len(set(long.facts) - set(short.facts)) <= 1  # the ground
        assert long.num_words > 2 * short.num_words


@pytest.mark.parametrize("style", ["plain", "referring"])
def test_describe_with_filler_repeats_no_fact(style: str):
    clip = SimpleTokenizer()
    words = {word for phrase in all_phrases() for word in re.findall("[a-z]+", phrase.lower())}
    for i, scene in enumerate(scenes(5, (0, 9), seed=3)):
        plain = describe(scene, np.random.default_rng(i), words=1200, style=style)
        filled = describe(scene, np.random.default_rng(i), words=1200, style=style, filler=True)
        assert 1200 <= filled.num_words < 1240 and len(clip.encode(filled.text)) > 1250
        assert filled.facts == plain.facts
        assert tuple(s for s in filled.sentences if s.facts) == plain.sentences
        assert set(re.findall("[a-z]+", filled.text.lower())) <= words


def test_describe_plain_names_objects_and_referring_does_not():
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


def test_describe_depends_only_on_the_generator():
    scene = scenes(1, (4, 4))[0]
    captions = {describe(scene, np.random.default_rng(i), words=80).text for i in range(10)}
    assert len(captions) == 10
    assert describe(scene, np.random.default_rng(3)).text == describe(scene, np.random.default_rng(3)).text


@pytest.mark.parametrize(("words", "sentences"), [(1, 2), (200, 10)])
def test_describe_scene_without_objects(words, sentences):
    caption = describe(Scene((), "teal"), np.random.default_rng(0), words=words)
    assert caption.facts[0] == Fact("ground", "teal") and len(caption.sentences) == sentences
    assert {fact.kind for fact in caption.facts[1:]} == {"empty"}
    assert len({fact.place for fact in caption.facts[1:]}) == sentences - 1


def test_describe_rejects_invalid_arguments():
    with pytest.raises(ValueError, match=r"style.*plain, referring.*'poem'"):
        describe(HAND, np.random.default_rng(0), style="poem")
    with pytest.raises(ValueError, match=r"words.*1.*got 0"):
        describe(HAND, np.random.default_rng(0), words=0)
