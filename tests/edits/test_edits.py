import launched
import pytest
import torch

from longalign.directions import Direction
from longalign.directions.compute import write_direction
from longalign.edits import DirectionEdit
from longalign.loop.fit import fit
from longalign.registry import ConfigError, edits, rewards
from longalign.testing import check_edit
from longalign.testing.tiny import edited

WORDS = {"positive": "good", "negative": "bad"}
PAIRS = {"name": "pairs", **WORDS}
D = torch.tensor([0.0, 0.6, 0.8])


def colours(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4).contiguous()


IMAGES = colours([0.0, 1.0, 0.0], [0.8, 0.0, 0.6])


@pytest.fixture
def worded(known):
    """The reward `known` with embeddings of "up" and "down" after control words."""
    known.table |= {"good up": [0.8, 0.6, 0.0], "good down": [0.8, -0.6, 0.0]}
    known.table |= {"bad up": [0.0, 0.6, 0.8], "bad down": [0.0, -0.6, 0.8]}
    return known


@pytest.fixture
def measured_file(known, tmp_path):
    return str(Direction.of(known, 2 * D, kind="images").save(tmp_path / "D.safetensors"))


def test_direction_equals_reweighted(clip_folder):
    inner = {"name": "denscore", "checkpoint": clip_folder}
    images, prompts = torch.rand(2, 3, 40, 40), ["A red fox. A wall.", "The sky."]
    short = rewards.build({"name": "reweighted", "inner": inner, "omega": 0.2, "direction": "running"})
    long = rewards.build(
        {"name": "edited", "inner": inner, "direction": "running", "edit": {"name": "direction", "omega": 0.2}}
    )
    one, other = short.score_components(images, prompts), long.score_components(images, prompts)
    assert torch.equal(one.total, other.total) and one.parts.keys() == other.parts.keys()
    assert isinstance(short.edit, DirectionEdit) and short.state_dict().keys() == long.state_dict().keys()


@pytest.mark.parametrize("direction", ["batch", "running"])
def test_none_logs_parts_of_plain_score(known, direction):
    scores = edited(known, "none", direction).score_components(IMAGES, ["up", "down"])
    assert torch.equal(scores.total, known.score(IMAGES, ["up", "down"]))
    assert torch.allclose(scores.parts["text_irrelevant"], torch.tensor([0.0, 0.48]))
    assert torch.allclose(scores.parts["edit_norm"], torch.ones(2))


def test_pairs_values(worded):
    scores = edited(worded, "pairs", k=1.0, **WORDS).score_components(IMAGES, ["up", "down"])
    assert torch.allclose(scores.parts["positive"], torch.tensor([0.6, 0.64]))
    assert torch.allclose(scores.parts["negative"], torch.tensor([0.6, 0.48]))
    assert torch.allclose(scores.total, torch.tensor([2 * 0.6 - 0.6, 2 * 0.64 - 0.48]))
    assert torch.allclose(scores.parts["text_relevant"] + scores.parts["text_irrelevant"], torch.tensor([0.8, 0.48]))
    one_word = edited(worded, "pairs", positive="good", negative="", k=0.0).score_components(IMAGES, ["up", "down"])
    assert torch.allclose(one_word.total, torch.tensor([0.6 - 0.8, 0.64 - 0.48]))


def test_measured_values(known, measured_file):
    scores = edited(known, "measured", file=measured_file).score_components(IMAGES, ["up", "in"])
    assert torch.allclose(scores.parts["measured_text"], torch.tensor([0.48, 1.0]))
    assert torch.allclose(scores.parts["measured_image"], torch.tensor([0.6, 0.48]))
    assert torch.allclose(scores.total, torch.tensor([0.8 - 0.48 * 0.6, 0.48 - 0.48]), atol=1e-6)
    halved = edited(known, "measured", file=measured_file, omega=0.5).score(IMAGES, ["up", "in"])
    assert torch.allclose(halved, torch.tensor([0.8 - 0.24 * 0.6, 0.24]))


@pytest.mark.parametrize(
    ("edit", "norms"),
    [
        ({"name": "none"}, [1.0, 1.0]),
        ({"name": "direction", "omega": 0.0}, [0.8, 0.8]),
        # |(k + 1) C+ - C-|^2 = (k + 1)^2 + 1 - 2 (k + 1) C+ . C- with unit embeddings and C+ . C- = 0.36
        ({**PAIRS, "k": 0.0}, [1.28**0.5] * 2),
        ({**PAIRS, "k": 1.0}, [3.56**0.5] * 2),
    ],
)
def test_edit_norm_is_the_scale_of_the_gradient(worded, edit, norms):
    """A sum weights its terms by the norm of the edited embedding as well."""
    worded.image_features = lambda images: images.mean((2, 3))
    images = IMAGES.clone().requires_grad_()
    scores = edited(worded, edit["name"], **{k: v for k, v in edit.items() if k != "name"}).score_components(
        images, ["up", "down"]
    )
    scores.total.sum().backward()
    assert images.grad is not None
    found = images.grad.sum((2, 3)).norm(dim=-1)
    assert torch.allclose(found, torch.tensor(norms)) and torch.allclose(scores.parts["edit_norm"], found)


def test_single_prompt_is_scored_without_a_common_direction(worded, measured_file):
    for name, keys in (("none", {}), ("pairs", WORDS), ("measured", {"file": measured_file})):
        scores = edited(worded, name, **keys).score_components(IMAGES[:1], ["up"])
        assert "text_relevant" not in scores.parts and "edit_norm" in scores.parts
    with pytest.raises(ValueError, match=r"got 1 prompt .*`direction: running`"):
        edited(worded, "direction").score(IMAGES[:1], ["up"])
    running = edited(worded, "pairs", "running", **WORDS)
    assert "text_relevant" not in running.eval().score_components(IMAGES, ["up", "down"]).parts
    assert "text_relevant" in running.train().score_components(IMAGES[:1], ["up"]).parts


def test_pairs_puts_control_word_before_each_encoded_text(clip_folder, monkeypatch):
    texts = []
    prompts = ["A red fox. The sky is green.", "A wall."]
    encoded = {
        "denscore": ["good A red fox.", "good The sky is green.", "good A wall."],
        "clip": ["good A red fox. The sky is green.", "good A wall."],
    }
    for name, expected in encoded.items():
        reward = rewards.build({"name": name, "checkpoint": clip_folder})
        embed = reward.towers.embed_texts
        monkeypatch.setattr(reward.towers, "embed_texts", lambda t, embed=embed: texts.extend(t) or embed(t))
        features = reward.prefixed_features(prompts, "good")
        assert sorted(texts) == sorted(expected)
        assert torch.allclose(features[0], reward.text_features(expected[:-1]).mean(0), atol=1e-6)
        texts.clear()


def test_control_word_takes_tokens_of_the_window_and_no_text_is_lost(clip_folder):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder})
    prompt = "The sky is red. " * 15
    count, window = reward.towers.count_tokens, reward.towers.window
    _, (segments,) = reward.segment_features([prompt], "a fox,")
    assert len(reward.segments(prompt)) == 1 and len(segments) == 2
    assert all(s.startswith("a fox, ") and count(s) <= window for s in segments)
    assert " ".join(s.removeprefix("a fox, ") for s in segments) == prompt.strip()
    with pytest.raises(ValueError, match=r"control word .* 80 tokens .* window of 75.*shorter"):
        reward.prefixed_features([prompt], "a " * 80)
    whole = rewards.build({"name": "clip", "checkpoint": clip_folder, "text": "whole"})
    with pytest.warns(UserWarning, match=r"76 tokens.* 75"):
        whole.prefixed_features(["a " * 74], "a fox")


def test_edits_reject_wrong_settings(known, measured_file, clip_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"positive and negative, got 'good'"):
        edits.validate({"name": "pairs", "positive": "good", "negative": "good "})
    with pytest.raises(ConfigError, match="omega: "):
        edits.validate({"name": "direction", "omega": -1})
    with pytest.raises(ConfigError, match=r"edit\.name: .*did you mean 'pairs'"):
        rewards.validate({"name": "edited", "inner": "clip", "edit": "pair"})
    (problem,) = edits.validate({"name": "measured", "file": "no.safetensors"}).check_files()
    assert problem[0] == "file" and "compute-direction --images" in problem[1]
    inner = {"name": "clip", "checkpoint": clip_folder}
    with pytest.raises(ValueError, match=r"width 3.*name clip.*width 16"):
        rewards.build({"name": "edited", "inner": inner, "edit": {"name": "measured", "file": measured_file}})
    with pytest.raises(ValueError, match=r"kind 'images'; use it in the edit 'measured'"):
        rewards.build({"name": "reweighted", "inner": inner, "direction": measured_file})


def test_edited_names_edit_that_returns_wrong_shape(known, monkeypatch):
    reward = edited(known, "none")
    monkeypatch.setattr(
        DirectionEdit, "forward", lambda self, text, *_: type("Edited", (), {"text": text[:1], "along": {}})
    )
    with pytest.raises(ValueError, match=r"DirectionEdit .*\(1, 3\); expected \(2, 3\)"):
        reward.score(IMAGES, ["up", "down"])


def test_edits_compose_with_sum_kl_ema_and_keep_best_and_resume_exactly(tmp_path):
    file = Direction.of(launched.Colours(), D, kind="learned").save(tmp_path / "D.safetensors")
    each = ["none", {"name": "direction", "omega": 0.0}, PAIRS, {"name": "measured", "file": str(file)}]
    terms = [{"reward": {"name": "edited", "inner": "colours", "direction": "running", "edit": edit}} for edit in each]
    kl = {"regularizer": "kl", "regularizer_weight": 0.1}
    monitor = {"prompts": ["ab", "cd"], "every": 1, "num_steps": 1, "guidance": 2.0, "keep_best": {"metric": "red"}}
    monitor["metrics"] = [{"name": "reward", "reward": "red"}]
    with launched.registered():
        whole = launched.worlds.reward_config(tmp_path / "whole", kl, steps=2, save_every=1, ema=0.5, accumulation=2)
        whole |= {"rewards": [{"name": "sum", "terms": terms, "normalize": "running"}], "monitor": monitor}
        halves = {**whole, "output": str(tmp_path / "halves")}
        fit(whole)
        fit({**halves, "loop": {**halves["loop"], "steps": 1}})
        fit(halves, resume=halves["output"])
    launched.assert_equal_runs(tmp_path / "halves", tmp_path / "whole")
    assert (tmp_path / "whole" / "best").is_symlink()
    logged = {key for line in launched.lines(tmp_path / "whole") for key in line}
    assert {"edited/text_relevant", "edited-3/positive", "edited-4/measured_image"} <= logged


@pytest.mark.parametrize("name", edits.names())
def test_check_edit(name, clip_folder, tmp_path):
    inner = {"name": "clip", "checkpoint": clip_folder}
    config = {"name": name}
    if name == "pairs":
        config |= WORDS
    if name == "measured":
        config["file"] = str(tmp_path / "D.safetensors")
        write_direction(inner, config["file"], prompts=["A wall.", "The sky."])
    check_edit(config, inner=inner)


def test_check_edit_names_failures(clip_folder, monkeypatch):
    forward = DirectionEdit.forward

    def of_batch(self, text, *args):
        text.add_(0.1)
        return forward(self, text - text.mean(0), *args)

    monkeypatch.setattr(DirectionEdit, "forward", of_batch)
    with pytest.raises(AssertionError, match=r"(?s)rows_are_independent.*input_is_unchanged") as caught:
        check_edit("none", inner={"name": "clip", "checkpoint": clip_folder})
    assert "nothing_is_trainable" not in str(caught.value)
