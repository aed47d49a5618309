"""Our sampler and conditioning beside a stock diffusers pipeline of the same weights."""

import pytest
import torch
from tiny import tiny_sd

from longalign import condition
from longalign.pipeline import generate, load_model, make_scheduler, sample

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


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # between diffusers' solvers and numpy 2
@pytest.mark.parametrize("scheduler", ["ddim", "unipc", "dpm++"])
def test_a_stock_pipeline_draws_the_same_images(tiny, scheduler):
    pipe, config = tiny
    _, backbone, encoder = load_model(config)
    ours = sample(
        backbone, encoder, PROMPTS, seeds=[3, 4], steps=4, guidance=3.0, scheduler=scheduler, negative="green"
    )
    pipe.scheduler = make_scheduler(scheduler, backbone.levels, backbone.prediction, 4)
    told = condition(pipe, PROMPTS, "green", encoder=encoder)
    assert told["prompt_embeds"].shape == told["negative_prompt_embeds"].shape == (2, 40, 16)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    drawn = pipe(**told, latents=noise, num_inference_steps=4, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(ours, drawn, atol=1e-4, rtol=0)
    assert ours.std() > 0.01


def test_an_encoder_is_built_from_its_config(tiny):
    pipe, config = tiny
    told = condition(pipe, PROMPTS[1], encoder=config["encoder"])
    again = condition(pipe, [PROMPTS[1]], encoder=load_model(config)[2])
    torch.testing.assert_close(told["prompt_embeds"], again["prompt_embeds"])


def test_generate_draws_from_a_config(tiny, tmp_path):
    _, config = tiny
    rows = generate(config, PROMPTS, tmp_path / "out", steps=1, guidance=1, height=64, width=128)
    assert [row["cut"] for row in rows] == ["", ""] and (tmp_path / "out" / rows[1]["file_name"]).exists()
