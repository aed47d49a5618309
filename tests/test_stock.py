"""Stock diffusers pipelines as the models to compare with: their own images, through our commands."""

import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from PIL import Image
from tiny import tiny_sd, tiny_sdxl

from longalign import baselines, hub
from longalign.cli import main
from longalign.image_io import load_image
from longalign.runtime import Runtime

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # between diffusers' solvers and numpy 2
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument"),  # between diffusers and its hub client
]
PROMPTS = ["A red fox sleeps on a wall.", "The sky is green."]
CPU = Runtime()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    return {"sd": str(tiny_sd(folder / "sd")), "sdxl": str(tiny_sdxl(folder / "sdxl"))}


def own(kind, folder, prompts, seeds, **settings):
    pipe = kind.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if "scheduler" in settings:
        pipe.scheduler = settings.pop("scheduler").from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, output_type="pil", **settings).images


def steps(one, other):
    """The mean difference of two images, in steps of 8 bits."""
    return 255 * (one - other).abs().mean().item()


@pytest.mark.parametrize(("name", "kind"), [("sd", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)])
def test_the_images_are_the_pipelines_own(folders, tmp_path, name, kind):
    rows = baselines.generate(
        folders[name],
        PROMPTS,
        tmp_path / "out",
        seeds=[3, 4],
        batch_size=3,
        num_steps=2,
        height=64,
        width=72,
        runtime=CPU,
    )
    assert [row["file_name"] for row in rows] == ["00000-3.png", "00000-4.png", "00001-3.png", "00001-4.png"]
    assert {row["truncated"] for row in rows} == {None}
    expected = own(kind, folders[name], [PROMPTS[1]] * 2, [3, 4], num_inference_steps=2, height=64, width=72)
    for i, image in enumerate(expected):
        drawn, other = (load_image(tmp_path / "out" / rows[k]["file_name"]) for k in (2 + i, i))
        # rounding moves single pixels by a step of 8 bits, another prompt the whole image
        assert steps(drawn, baselines._tensor(image)) < 0.01 < 0.3 < steps(other, baselines._tensor(image))
    with Image.open(tmp_path / "out" / "00000-3.png") as image:
        assert image.size == (72, 64)
        assert json.loads(image.text["config"]) == {"pipeline": folders[name], "class": kind.__name__}
        assert json.loads(image.text["settings"])["num_steps"] == 2


def test_settings_go_through(folders, tmp_path):
    options = ["--num-steps", "3", "--guidance", "2", "--negative", "green", "--solver", "ddim", "--seed", "7"]
    output = tmp_path / "out"
    assert (
        main(["generate", "--pipeline", folders["sd"], "--prompt", PROMPTS[0], *options, "--output", str(output)]) == 0
    )
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "green"}
    (expected,) = own(StableDiffusionPipeline, folders["sd"], PROMPTS[0], [7], scheduler=DDIMScheduler, **settings)
    assert steps(load_image(output / "00000-7.png"), baselines._tensor(expected)) < 0.01
    settings.pop("negative_prompt")
    (plain,) = own(StableDiffusionPipeline, folders["sd"], PROMPTS[0], [7], scheduler=DDIMScheduler, **settings)
    assert steps(baselines._tensor(plain), baselines._tensor(expected)) > 0.1


def test_a_comparison_is_one_command(folders, brightness, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", brightness, "--num-steps", "1"]
    assert main(["score", "--pipeline", folders["sd"], *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].endswith("mean of 2")
    output = tmp_path / "compared"
    models = ["--pipeline", f"xl={folders['sdxl']}", f"sd={folders['sd']}"]
    assert main(["eval", *models, *given, "--output", str(output), "--json", str(tmp_path / "t.json")]) == 0
    assert "sd - xl" in capsys.readouterr().out
    values = json.loads((tmp_path / "t.json").read_text())["values"]
    assert list(values) == ["xl", "sd"]
    assert values["sd"]["brightness"] == pytest.approx([float(line.split("\t")[0]) for line in lines[1:3]], abs=1e-4)
    again = ["eval", "--images", f"xl={output / 'xl'}", f"sd={output / 'sd'}", "--reward", brightness]
    assert main(again) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--pipeline", "nowhere", "--prompt", "a", "--output", "x"], "no diffusers pipeline 'nowhere'"),
        (["score", "--pipeline", "nowhere", "--reward", "clip"], "give --prompt or --prompts"),
        (["score", "--images", "a", "--output", "x", "--reward", "clip"], "--output only applies when generating"),
        (
            ["eval", "--images", "a=b", "--num-steps", "3", "--reward", "clip"],
            "--num-steps only applies when generating",
        ),
        (["eval", "--pipeline", "a=b", "--prompt", "a", "--reward", "clip"], "give --output"),
        (["eval", "--reward", "clip"], "give models to compare"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_what_a_pipeline_lacks_is_named(tmp_path):
    class Bare:
        scheduler = None

        def __call__(self, prompt, num_inference_steps=3, **more):
            raise AssertionError

    assert baselines.arguments(Bare(), num_steps=4, height=None) == {"num_inference_steps": 4}
    with pytest.raises(ValueError, match="Bare takes no 'guidance_scale'; leave out guidance"):
        baselines.arguments(Bare(), guidance=3.0)
    with pytest.raises(ValueError, match="does nothing at guidance 1"):
        baselines.arguments(StableDiffusionPipeline.__new__(StableDiffusionPipeline), negative="a", guidance=1)
    with pytest.raises(ValueError, match="no solver 'euler'; available: unipc"):
        baselines.set_scheduler(Bare(), "euler")
    with pytest.raises(ValueError, match="Bare cannot be drawn with 'ddim'"):
        baselines.set_scheduler(Bare(), "ddim")
    unet = UNet2DModel(
        sample_size=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a DDPMPipeline, which takes no prompt"):
        baselines.load_pipeline(str(tmp_path), CPU)


def test_blackened_images_are_told(folders, tmp_path, monkeypatch, caplog):
    pipe = baselines.load_pipeline(folders["sd"], CPU)
    call = type(pipe).__call__

    def unsafe(self, *args, **keys):
        drawn = call(self, *args, **keys)
        drawn.nsfw_content_detected = [False, True]
        return drawn

    monkeypatch.setattr(type(pipe), "__call__", unsafe)
    monkeypatch.setattr(unsafe, "__signature__", baselines.inspect.signature(call), raising=False)
    with caplog.at_level(logging.WARNING, "longalign"):
        baselines.generate(folders["sd"], PROMPTS, tmp_path / "out", num_steps=1, runtime=CPU)
    assert "blackened seed 0 of the prompt 'The sky is green.'" in caplog.text


def test_a_download_is_announced_before_it_starts(monkeypatch, caplog):
    caplog.set_level("INFO", "longalign")
    monkeypatch.setattr(hub, "offline", lambda: False)
    asked = []

    def from_pretrained(name, **settings):
        asked.append([name, len(caplog.messages)])
        raise OSError("no network here")

    for kind in ("AutoPipelineForText2Image", "DiffusionPipeline"):
        monkeypatch.setattr(getattr(baselines.library, kind), "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="no diffusers pipeline 'owner/name'"):
        baselines.load_pipeline("owner/name", Runtime())
    assert asked == [["owner/name", 1]] and "downloading the weights of owner/name" in caplog.messages[0]
    with pytest.raises(ValueError, match="no diffusers pipeline"):
        baselines.load_pipeline("mini/sd", Runtime())  # bundled: nothing to download
    assert Path(asked[1][0]).is_dir() and len(caplog.messages) == 1
