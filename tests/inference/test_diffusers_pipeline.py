"""`sample` and `condition` compared with a diffusers pipeline of the same weights."""

import pytest
import torch

from longalign import condition
from longalign.encoders.pipeline_encoder import pipeline_encoder
from longalign.inference.sampling import generate, load_model, sample
from longalign.inference.schedulers import make_scheduler
from longalign.testing.tiny import tiny_sd, tiny_sd3, tiny_sdxl

PROMPTS = ["A red fox sleeps on a wall. The sky is green. A wall is red.", "The sky."]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from diffusers import StableDiffusionPipeline

    folder = tiny_sd(tmp_path_factory.mktemp("sd"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    config = {
        "backbone": {"name": "sd", "checkpoint": str(folder)},
        "encoder": {"name": "clip-segment", "checkpoint": str(folder), "max_tokens": 40},
    }
    return pipe, config


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' solvers with numpy 2
@pytest.mark.parametrize("solver", ["ddim", "unipc", "dpm++"])
def test_sample_matches_diffusers_pipeline(tiny, solver):
    pipe, config = tiny
    _, backbone, encoder = load_model(config)
    images = sample(
        backbone, encoder, PROMPTS, seeds=[3, 4], num_steps=4, guidance=3.0, solver=solver, negative="green"
    )
    pipe.scheduler = make_scheduler(solver, backbone.noise_levels, backbone.prediction, 4)
    conditioning = condition(pipe, PROMPTS, "green", encoder=encoder)
    assert conditioning["prompt_embeds"].shape == conditioning["negative_prompt_embeds"].shape == (2, 40, 16)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    expected = pipe(**conditioning, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert images.std() > 0.01


def test_condition_builds_encoder_from_config(tiny):
    pipe, config = tiny
    conditioning = condition(pipe, PROMPTS[1], encoder=config["encoder"])
    expected = condition(pipe, [PROMPTS[1]], encoder=load_model(config)[2])
    torch.testing.assert_close(conditioning["prompt_embeds"], expected["prompt_embeds"])


def test_generate_from_config(tiny, tmp_path):
    _, config = tiny
    rows = generate(config, PROMPTS, tmp_path / "out", num_steps=1, guidance=1, height=64, width=128)
    assert [row["truncated"] for row in rows] == ["", ""] and (tmp_path / "out" / rows[1]["file_name"]).exists()


def load(folder, name="DiffusionPipeline", **settings):
    import diffusers

    from longalign.inference.pipelines import DTYPE

    pipe = getattr(diffusers, name).from_pretrained(folder, **{DTYPE: torch.float32, **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers' solvers with numpy 2
@pytest.mark.parametrize(
    ("build", "config"),
    [
        (tiny_sd, {"name": "clip-segment"}),
        (tiny_sdxl, {"name": "clip-segment-sdxl"}),
        (tiny_sd3, {"name": "clip-segment-sd3", "width": 32}),
    ],
)
def test_condition_defaults_to_pipeline_text_encoders(tmp_path, build, config):
    pipe = load(build(tmp_path))
    for prompt in ("A red fox sleeps on a wall.", PROMPTS[0]):
        default = condition(pipe, prompt)
        settings = {"checkpoint": str(tmp_path), "overflow": "grow", "segmenter": {"name": "packed"}, "sot": "first"}
        explicit = condition(pipe, prompt, encoder={**config, **settings})
        assert default.keys() == explicit.keys()
        for key in default:
            torch.testing.assert_close(default[key], explicit[key], atol=1e-5, rtol=1e-5)
    assert pipe(**default, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
    assert condition(pipe, PROMPTS[0] * 80)["prompt_embeds"].shape[1] > 1000


def test_condition_sd3_without_t5_and_sdxl_empty_prompt(tmp_path):
    pipe = load(tiny_sd3(tmp_path / "sd3"), text_encoder_3=None, tokenizer_3=None)
    embeds = condition(pipe, "A red fox.")["prompt_embeds"]
    assert embeds.shape == (1, 496, 32) and embeds[:, 240:].abs().sum() == 0
    pipe = load(tiny_sdxl(tmp_path / "sdxl"))
    assert condition(pipe, "A fox.")["negative_pooled_prompt_embeds"].abs().sum() == 0
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert condition(pipe, "A fox.")["negative_pooled_prompt_embeds"].abs().sum() > 0


def test_condition_follows_text_encoder_changes(tmp_path):
    pipe = load(tiny_sd(tmp_path))
    before = condition(pipe, "A fox.")["prompt_embeds"]
    pipe.text_encoder.train()
    embeddings = pipe.text_encoder.get_input_embeddings().weight
    embeddings.requires_grad_(False)
    with torch.no_grad():
        next(p for n, p in pipe.text_encoder.named_parameters() if "fc1.weight" in n).mul_(2)
    after = condition(pipe, "A fox.")["prompt_embeds"]
    assert not torch.allclose(before, after) and not torch.allclose(before[:, 100], after[:, 100])
    # a text encoder in training mode stays in training mode
    assert pipe.text_encoder.training and not embeddings.requires_grad
    assert sum(p.requires_grad for p in pipe.text_encoder.parameters()) > 5
    pipe.text_encoder = load(tmp_path).text_encoder
    assert torch.equal(before, condition(pipe, "A fox.")["prompt_embeds"])
    pipe.text_encoder.bfloat16()
    assert condition(pipe, "A fox.")["prompt_embeds"].dtype == torch.float32  # the denoiser's


def test_condition_expands_textual_inversion_tokens(tmp_path):
    pipe = load(tiny_sd(tmp_path), "StableDiffusionPipeline")
    pipe.load_textual_inversion(torch.randn(3, 16), token="<fox>")
    conditioning = condition(pipe, "A <fox> sleeps.")["prompt_embeds"]
    with pipeline_encoder(pipe) as encoder:
        expected = encoder.encode(["A <fox> <fox>_1 <fox>_2 sleeps.", ""])
    assert expected.reports[0].tokens == (6,)
    torch.testing.assert_close(conditioning, expected.states[:1])


def test_condition_offloaded_text_encoder(tmp_path):
    from accelerate import cpu_offload

    pipe = load(tiny_sd(tmp_path))
    expected = condition(pipe, PROMPTS)["prompt_embeds"]
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(part, torch.device("cpu"))
    assert pipe.text_encoder.device.type == "meta"
    torch.testing.assert_close(condition(pipe, PROMPTS)["prompt_embeds"], expected)


def test_condition_caches_encoder_of_config(tiny, monkeypatch):
    from longalign.encoders.clip.segment import ClipSegmentEncoder

    pipe, config = tiny
    built, load = [], ClipSegmentEncoder.from_config.__func__
    monkeypatch.setattr(
        ClipSegmentEncoder, "from_config", classmethod(lambda cls, *a: (built.append(a), load(cls, *a))[1])
    )
    config = {**config["encoder"], "max_tokens": 41}
    for _ in range(3):
        condition(pipe, PROMPTS, encoder=config)
    assert len(built) == 1
    condition(pipe, PROMPTS, encoder={**config, "max_tokens": 42})
    assert len(built) == 2


def test_condition_missing_text_encoder_raises(tmp_path):
    pipe = load(tiny_sdxl(tmp_path), text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match=r"text_encoder: .*text_encoder_2: CLIP.*encoder="):
        condition(pipe, "A fox.")


def test_bundled_sd_pipeline_runs_in_float32():
    """Without a dtype, transformers loads the config's dtype and diffusers float32."""
    from diffusers import StableDiffusionPipeline

    from longalign.runtime import resolve_checkpoint

    pipe = StableDiffusionPipeline.from_pretrained(resolve_checkpoint("mini/sd"))
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float32}
    for conditioning in ({"prompt": "A red circle."}, condition(pipe, "A red circle.")):
        assert pipe(**conditioning, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)
