"""Stable Diffusion pipelines as baselines: images, settings, commands and messages."""

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

from longalign import hub
from longalign.cli.main import main
from longalign.image_io import load_image, to_tensor
from longalign.inference import baselines, pipelines
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_sd, tiny_sdxl

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' solvers with numpy 2
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument"),  # diffusers with its Hub client
]
PROMPTS = ["A red fox sleeps on a wall.", "The sky is green."]
CPU = Runtime()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    return {"sd": str(tiny_sd(folder / "sd")), "sdxl": str(tiny_sdxl(folder / "sdxl"))}


def run_pipeline(pipeline_class, folder, prompts, seeds, **settings):
    pipe = pipeline_class.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if "scheduler" in settings:
        pipe.scheduler = settings.pop("scheduler").from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, output_type="pil", **settings).images


def pixel_difference(a, b):
    """The mean difference of two images, in 8-bit steps."""
    return 255 * (a - b).abs().mean().item()


@pytest.mark.parametrize(
    ("name", "pipeline_class"), [("sd", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_baselines_generate_matches_pipeline(folders, tmp_path, name, pipeline_class):
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
    expected = run_pipeline(
        pipeline_class, folders[name], [PROMPTS[1]] * 2, [3, 4], num_inference_steps=2, height=64, width=72
    )
    for i, image in enumerate(expected):
        generated, other = (load_image(tmp_path / "out" / rows[k]["file_name"]) for k in (2 + i, i))
        # rounding changes single pixels by one 8-bit step, a different prompt changes the whole image
        image = to_tensor(image)
        assert pixel_difference(generated, image) < 0.01 < 0.3 < pixel_difference(other, image)
    with Image.open(tmp_path / "out" / "00000-3.png") as image:
        assert image.size == (72, 64)
        assert json.loads(image.text["config"]) == {"pipeline": folders[name], "class": pipeline_class.__name__}
        assert json.loads(image.text["settings"])["num_steps"] == 2


def test_generate_command_passes_settings_to_pipeline(folders, tmp_path):
    options = ["--num-steps", "3", "--guidance", "2", "--negative", "green", "--solver", "ddim", "--seed", "7"]
    output = tmp_path / "out"
    assert (
        main(["generate", "--pipeline", folders["sd"], "--prompt", PROMPTS[0], *options, "--output", str(output)]) == 0
    )
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "negative_prompt": "green"}
    (expected,) = run_pipeline(
        StableDiffusionPipeline, folders["sd"], PROMPTS[0], [7], scheduler=DDIMScheduler, **settings
    )
    assert pixel_difference(load_image(output / "00000-7.png"), to_tensor(expected)) < 0.01
    settings.pop("negative_prompt")
    (without_negative,) = run_pipeline(
        StableDiffusionPipeline, folders["sd"], PROMPTS[0], [7], scheduler=DDIMScheduler, **settings
    )
    assert pixel_difference(to_tensor(without_negative), to_tensor(expected)) > 0.1


def test_eval_and_score_pipelines(folders, brightness, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", brightness, "--num-steps", "1"]
    assert main(["score", "--pipeline", folders["sd"], *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].endswith("mean of 2")
    output = tmp_path / "compared"
    models = ["--pipeline", f"xl={folders['sdxl']}", f"sd={folders['sd']}"]
    assert main(["eval", *models, *options, "--output", str(output), "--json", str(tmp_path / "t.json")]) == 0
    assert "sd - xl" in capsys.readouterr().out
    values = json.loads((tmp_path / "t.json").read_text())["values"]
    assert list(values) == ["xl", "sd"]
    assert values["sd"]["brightness"] == pytest.approx([float(line.split("\t")[0]) for line in lines[1:3]], abs=1e-4)
    rescore = ["eval", "--images", f"xl={output / 'xl'}", f"sd={output / 'sd'}", "--reward", brightness]
    assert main(rescore) == 0


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["generate", "--pipeline", "nowhere", "--prompt", "a", "--output", "x"], "'nowhere'"),
        (["score", "--pipeline", "nowhere", "--reward", "clip"], "--prompt or --prompts"),
        (["score", "--images", "a", "--output", "x", "--reward", "clip"], "--output"),
        (
            ["eval", "--images", "a=b", "--num-steps", "3", "--reward", "clip"],
            "--num-steps",
        ),
        (["eval", "--pipeline", "a=b", "--prompt", "a", "--reward", "clip"], "--output"),
        (["eval", "--reward", "clip"], "--images, --checkpoint or --pipeline"),
    ],
)
def test_pipeline_commands_invalid_arguments(arguments, key, capsys):
    assert main(arguments) == 2
    assert key in capsys.readouterr().err


def test_baselines_unsupported_settings_raise(tmp_path):
    class Bare:
        scheduler = None

        def __call__(self, prompt, num_inference_steps=3, **kwargs):
            raise AssertionError

    assert baselines.call_kwargs(Bare(), num_steps=4, height=None) == {"num_inference_steps": 4}
    with pytest.raises(ValueError, match=r"Bare.*'guidance_scale'.* guidance$"):
        baselines.call_kwargs(Bare(), guidance=3.0)
    with pytest.raises(ValueError, match=r"negative prompt.*guidance 1;"):
        baselines.call_kwargs(StableDiffusionPipeline.__new__(StableDiffusionPipeline), negative="a", guidance=1)
    with pytest.raises(ValueError, match=r"solver 'euler'.*unipc, ddim"):
        baselines.set_scheduler(Bare(), "euler")
    with pytest.raises(ValueError, match=r"Bare.*'ddim'"):
        baselines.set_scheduler(Bare(), "ddim")
    unet = UNet2DModel(
        sample_size=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DDPMPipeline.*prompt"):
        pipelines.load_pipeline(str(tmp_path), CPU)


def test_baselines_generate_warns_of_unsafe_images(folders, tmp_path, monkeypatch, caplog):
    pipe = pipelines.load_pipeline(folders["sd"], CPU)
    call = type(pipe).__call__

    def unsafe(self, *args, **keys):
        output = call(self, *args, **keys)
        output.nsfw_content_detected = [False, True]
        return output

    monkeypatch.setattr(type(pipe), "__call__", unsafe)
    monkeypatch.setattr(unsafe, "__signature__", baselines.inspect.signature(call), raising=False)
    with caplog.at_level(logging.WARNING, "longalign"):
        baselines.generate(folders["sd"], PROMPTS, tmp_path / "out", num_steps=1, runtime=CPU)
    (message,) = caplog.messages
    assert "seed 0" in message and "'The sky is green.'" in message


def test_load_pipeline_logs_download_first(monkeypatch, caplog):
    caplog.set_level("INFO", "longalign")
    monkeypatch.setattr(hub, "offline", lambda: False)
    calls = []

    def from_pretrained(name, **settings):
        calls.append([name, len(caplog.messages)])
        raise OSError("no network here")

    for kind in ("AutoPipelineForText2Image", "DiffusionPipeline"):
        monkeypatch.setattr(getattr(pipelines.library, kind), "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="pipeline 'owner/name'"):
        pipelines.load_pipeline("owner/name", Runtime())
    assert calls == [["owner/name", 1]] and "owner/name" in caplog.messages[0]
    with pytest.raises(ValueError, match=r"pipeline '.*sd'"):
        pipelines.load_pipeline("mini/sd", Runtime())  # bundled, no download
    assert Path(calls[1][0]).is_dir() and len(caplog.messages) == 1
