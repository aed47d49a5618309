"""The models that the paper compares with, in the layouts that they are published in, through our commands."""

import json
import logging
import shutil
from functools import cache

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from huggingface_hub import constants
from tiny import tiny_sdxl, tiny_t5
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5EncoderModel,
)

from longalign import baselines
from longalign.cli import main
from longalign.image_io import load_image
from longalign.mini.tokenizers import write_clip_tokenizer
from longalign.runtime import Runtime

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # between diffusers' solvers and numpy 2
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument"),  # between diffusers and its hub client
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),  # of diffusers by diffusers
]
PROMPTS = ["A red fox sleeps on a wall.", "The sky is green."]
CPU = Runtime()
DECODER, PRIOR = "kandinsky-community/kandinsky-2-2-decoder", "kandinsky-community/kandinsky-2-2-prior"
CARD = f"---\nlicense: apache-2.0\nprior:\n- {PRIOR}\ntags:\n- text-to-image\n- kandinsky\ninference: false\n---\n"


def publish(folder, kind, **components):
    """Writes ``model_index.json`` as it is on the hub: the class and the components by their published classes."""
    index = {"_class_name": kind, "_diffusers_version": "0.22.0.dev0"}
    (folder / "model_index.json").write_text(json.dumps({**index, **components}))
    return folder


def lively(module):
    """Weights large enough that a prompt changes the image."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.4)
    return module


def tiny_playground(folder):
    tiny_sdxl(folder)
    scheduler = EulerAncestralDiscreteScheduler.from_pretrained(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    return publish(
        folder, "StableDiffusionXLPipeline", force_zeros_for_empty_prompt=True,
        scheduler=["diffusers", "EulerAncestralDiscreteScheduler"], text_encoder=["transformers", "CLIPTextModel"],
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"], tokenizer=["transformers", "CLIPTokenizer"],
        tokenizer_2=["transformers", "CLIPTokenizer"], unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"],
    )  # fmt: skip


def tiny_pixart(folder):
    """PixArt-alpha of 256 px, the smallest size that its pipeline has; the transformer's class has its older name."""
    t5 = tiny_t5(folder / "t5")
    tokens = AutoTokenizer.from_pretrained(t5)
    torch.manual_seed(5)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8, caption_channels=16, num_layers=1,
        sample_size=32,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, sample_size=256, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    PixArtAlphaPipeline(
        tokens, T5EncoderModel.from_pretrained(t5), vae, transformer,
        DPMSolverMultistepScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    shutil.rmtree(t5)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    published = {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    more = {"only_cross_attention": False, "use_linear_projection": False, "norm_type": "ada_norm_single"}
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, **published, **more}))
    return publish(
        folder, "PixArtAlphaPipeline", scheduler=["diffusers", "DPMSolverMultistepScheduler"],
        text_encoder=["transformers", "T5EncoderModel"], tokenizer=["transformers", type(tokens).__name__],
        transformer=["diffusers", "Transformer2DModel"], vae=["diffusers", "AutoencoderKL"],
    )  # fmt: skip


def tiny_kandinsky(decoder, prior):
    """Kandinsky 2.2: a decoder that reads an image embedding, and the prior that makes one of a text."""
    tokens = CLIPTokenizerFast.from_pretrained(write_clip_tokenizer(prior / "tokenizer", PROMPTS))
    torch.manual_seed(6)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    text = CLIPTextConfig(**tower, **ends, vocab_size=len(tokens), projection_dim=8)
    KandinskyV22PriorPipeline(
        lively(PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**tower, image_size=16, patch_size=8, projection_dim=8)),
        lively(CLIPTextModelWithProjection(text)), tokens,
        UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0),
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    ).save_pretrained(prior)  # fmt: skip
    publish(
        prior, "KandinskyV22PriorPipeline", image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        image_processor=["transformers", "CLIPImageProcessor"], prior=["diffusers", "PriorTransformer"],
        scheduler=["diffusers", "UnCLIPScheduler"], text_encoder=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"],
    )  # fmt: skip
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=8,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", addition_embed_type="image", encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj", resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    for part in (unet.add_embedding, unet.encoder_hid_proj):
        lively(part)
    movq = VQModel(
        block_out_channels=(32,) * 4, latent_channels=4, num_vq_embeddings=8, vq_embed_dim=4,
        norm_type="spatial", down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, clip_sample=False, variance_type="learned_range", thresholding=False
    )
    KandinskyV22Pipeline(unet, scheduler, movq).save_pretrained(decoder)
    (decoder / "README.md").write_text(CARD)
    return publish(
        decoder, "KandinskyV22Pipeline", movq=["diffusers", "VQModel"], scheduler=["diffusers", "DDPMScheduler"],
        unet=["diffusers", "UNet2DConditionModel"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the hub as a download leaves it, with both of Kandinsky's repositories."""
    home, folders = tmp_path_factory.mktemp("hub"), []
    for name, commit in ((DECODER, "d" * 40), (PRIOR, "e" * 40)):
        repository = home / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        folders.append(repository / "snapshots" / commit)
    tiny_kandinsky(*folders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(baselines, "load_pipeline", cache(baselines.load_pipeline))
        yield home


@pytest.fixture(scope="module")
def models(tmp_path_factory, hub):
    """What ``--pipeline`` is given for each model."""
    folder = tmp_path_factory.mktemp("baselines")
    playground, pixart = tiny_playground(folder / "playground"), tiny_pixart(folder / "pixart")
    return {"playground": str(playground), "pixart": str(pixart), "kandinsky": DECODER}


KINDS = {
    "playground": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
    "kandinsky": "KandinskyV22CombinedPipeline",
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("negative", [None, "green"])
def test_images_are_the_pipelines_own_in_any_batch(models, tmp_path, name, negative):
    output, size = tmp_path / "out", ["--size", "64", "--num-steps", "2", "--guidance", "3"]
    negatives = [] if negative is None else ["--negative", negative]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    assert main(["generate", "--pipeline", models[name], *prompts, *size, *negatives, "--output", str(output)]) == 0
    pipe = baselines.load_pipeline(models[name], CPU)
    assert type(pipe).__name__ == KINDS[name]
    own = {} if negative is None else {"negative_prompt": negative}
    drawn = [load_image(output / f"{i:05d}-0.png") for i in range(2)]
    for prompt, ours, other in zip(PROMPTS, drawn, reversed(drawn), strict=True):
        generator = torch.Generator().manual_seed(0)
        image = pipe(
            prompt, generator=generator, height=64, width=64, num_inference_steps=2, guidance_scale=3.0, **own
        ).images[0]
        # rounding moves single pixels by a step of 8 bits, another prompt the whole image
        assert steps(ours, baselines._tensor(image)) < 0.01 < 0.3 < steps(other, baselines._tensor(image))


def steps(one, other):
    """The mean difference of two images, in steps of 8 bits."""
    return 255 * (one - other).abs().mean().item()


def test_a_comparison_is_one_command(models, brightness, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", brightness, "--num-steps", "2", "--size", "64"]
    names = [f"{name}={where}" for name, where in models.items()]
    output = tmp_path / "compared"
    assert main(["eval", "--pipeline", *names, *given, "--output", str(output), "--json", str(tmp_path / "t")]) == 0
    assert "kandinsky - playground" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "t").read_text())["values"]) == list(models)
    assert main(["score", "--pipeline", models["kandinsky"], *given]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("mean of 2")


def test_a_decoder_is_drawn_with_by_the_scheduler_asked_for(models):
    pipe = baselines.load_pipeline(models["kandinsky"], CPU)
    own, prior = pipe.scheduler, pipe.prior_pipe.scheduler

    def draw():
        generator = torch.Generator().manual_seed(0)
        image = pipe(PROMPTS[0], height=64, width=64, num_inference_steps=2, generator=generator).images[0]
        return baselines._tensor(image)

    drawn = {"own": draw()}
    for name in ("dpm++", "ddim"):
        baselines.set_scheduler(pipe, name)
        assert type(pipe.decoder_pipe.scheduler).__name__ == baselines.SCHEDULER_CLASSES[name]
        assert pipe.prior_pipe.scheduler is prior
        drawn[name] = draw()
        pipe.scheduler = own
    pipe.decoder_pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    assert torch.equal(drawn["ddim"], draw())
    pipe.decoder_pipe.scheduler = own
    assert torch.equal(drawn["own"], draw()) and not torch.equal(drawn["own"], drawn["ddim"])
    for name in ("lcm", "unipc"):  # of other models; it takes no generators
        with pytest.raises(ValueError, match=f"KandinskyV22CombinedPipeline cannot be drawn with '{name}'"):
            baselines.set_scheduler(pipe, name)


def test_a_size_that_a_pipeline_does_not_have_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match=r"KandinskyV22CombinedPipeline drew images of height 128 instead of 72"):
        baselines.generate(models["kandinsky"], PROMPTS[:1], tmp_path, num_steps=1, height=72, width=64, runtime=CPU)


def test_a_decoder_without_its_prior_is_refused(hub, tmp_path, monkeypatch):
    (decoder,) = hub.glob("*decoder/snapshots/*")
    alone = tmp_path / "decoder"
    shutil.copytree(decoder, alone, ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(ValueError, match=r"a decoder whose README.md names its prior, .*prior_prior"):
        baselines.load_pipeline(str(alone), CPU)
    (alone / "README.md").write_text(CARD.replace(PRIOR, "nobody/nothing"))
    with pytest.raises(ValueError, match=r"no diffusers pipeline .*decoder'.*nobody/nothing"):
        baselines.load_pipeline(str(alone), CPU)
    (prior,) = hub.glob("*prior/snapshots/*")
    (alone / "README.md").write_text(CARD.replace(PRIOR, str(prior)))
    assert type(baselines.load_pipeline(str(alone), CPU)).__name__ == KINDS["kandinsky"]


def test_a_tokenizer_that_cannot_be_read_is_told(models, tmp_path):
    shutil.copytree(models["pixart"], tmp_path / "pixart", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "pixart" / "tokenizer" / "spiece.model").write_bytes(b"not a vocabulary")
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        baselines.load_pipeline(str(tmp_path / "pixart"), CPU)


def test_captions_that_are_not_cleaned_are_told_once(models, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None if name == "bs4" else True)
    with caplog.at_level(logging.WARNING, "longalign"):
        baselines.generate(
            models["pixart"], PROMPTS, tmp_path, batch_size=1, num_steps=2, height=64, width=64, runtime=CPU
        )
    (negatives,) = caplog.messages
    assert "beautifulsoup4 is not installed" in negatives and "pip install beautifulsoup4" in negatives
    monkeypatch.setattr(baselines, "find_spec", lambda name: True)
    assert baselines.cleaning(baselines.load_pipeline(models["pixart"], CPU)) == {}
    assert baselines.cleaning(baselines.load_pipeline(models["playground"], CPU)) == {}
