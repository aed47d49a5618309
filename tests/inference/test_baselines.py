"""Baselines of the paper in their published layouts, through the commands."""

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

from longalign.cli.main import main
from longalign.config.solvers import SCHEDULER_CLASSES
from longalign.image_io import load_image, to_tensor
from longalign.inference import baselines
from longalign.mini.tokenizers import write_clip_tokenizer
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_sdxl, tiny_t5

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),  # diffusers' solvers with numpy 2
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument"),  # diffusers with its Hub client
    pytest.mark.filterwarnings("ignore:`callback_steps` is deprecated:FutureWarning"),  # diffusers with itself
]
PROMPTS = ["A red fox sleeps on a wall.", "The sky is green."]
CPU = Runtime()
DECODER, PRIOR = "kandinsky-community/kandinsky-2-2-decoder", "kandinsky-community/kandinsky-2-2-prior"
CARD = f"---\nlicense: apache-2.0\nprior:\n- {PRIOR}\ntags:\n- text-to-image\n- kandinsky\ninference: false\n---\n"


def publish(folder, class_name, **components):
    """Writes ``model_index.json`` as on the Hub, with the published class names."""
    index = {"_class_name": class_name, "_diffusers_version": "0.22.0.dev0"}
    (folder / "model_index.json").write_text(json.dumps({**index, **components}))
    return folder


def scale_weights(module):
    """Makes the weights large enough for a prompt to change the image."""
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
    """PixArt-alpha of 256 px, the smallest size of its pipeline; the transformer's class has its old name."""
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
    unused = {"only_cross_attention": False, "use_linear_projection": False, "norm_type": "ada_norm_single"}
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, **published, **unused}))
    return publish(
        folder, "PixArtAlphaPipeline", scheduler=["diffusers", "DPMSolverMultistepScheduler"],
        text_encoder=["transformers", "T5EncoderModel"], tokenizer=["transformers", type(tokens).__name__],
        transformer=["diffusers", "Transformer2DModel"], vae=["diffusers", "AutoencoderKL"],
    )  # fmt: skip


def tiny_kandinsky(decoder, prior):
    """Kandinsky 2.2: a decoder conditioned on an image embedding, and the prior that predicts one from text."""
    tokens = CLIPTokenizerFast.from_pretrained(write_clip_tokenizer(prior / "tokenizer", PROMPTS))
    torch.manual_seed(6)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special_tokens = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id}
    text = CLIPTextConfig(**sizes, **special_tokens, vocab_size=len(tokens), projection_dim=8)
    KandinskyV22PriorPipeline(
        scale_weights(PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8)),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)),
        scale_weights(CLIPTextModelWithProjection(text)), tokens,
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
        scale_weights(part)
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
    """A local Hub cache with both of Kandinsky's repositories."""
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
    """Value of ``--pipeline`` for each model."""
    folder = tmp_path_factory.mktemp("baselines")
    playground, pixart = tiny_playground(folder / "playground"), tiny_pixart(folder / "pixart")
    return {"playground": str(playground), "pixart": str(pixart), "kandinsky": DECODER}


CLASSES = {
    "playground": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
    "kandinsky": "KandinskyV22CombinedPipeline",
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("negative", [None, "green"])
def test_baselines_match_pipeline_in_any_batch(models, tmp_path, name, negative):
    output, size = tmp_path / "out", ["--size", "64", "--num-steps", "2", "--guidance", "3"]
    negatives = [] if negative is None else ["--negative", negative]
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    assert main(["generate", "--pipeline", models[name], *prompts, *size, *negatives, "--output", str(output)]) == 0
    pipe = baselines.load_pipeline(models[name], CPU)
    assert type(pipe).__name__ == CLASSES[name]
    negative_kwargs = {} if negative is None else {"negative_prompt": negative}
    images = [load_image(output / f"{i:05d}-0.png") for i in range(2)]
    for prompt, image, other in zip(PROMPTS, images, reversed(images), strict=True):
        generator = torch.Generator().manual_seed(0)
        expected = pipe(
            prompt,
            generator=generator,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=3.0,
            **negative_kwargs,
        ).images[0]
        # rounding changes single pixels by one 8-bit step, a different prompt changes the whole image
        expected = to_tensor(expected)
        assert pixel_difference(image, expected) < 0.01 < 0.3 < pixel_difference(other, expected)


def pixel_difference(a, b):
    """The mean difference of two images, in 8-bit steps."""
    return 255 * (a - b).abs().mean().item()


def test_eval_and_score_pipelines(models, brightness, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--reward", brightness, "--num-steps", "2", "--size", "64"]
    named = [f"{name}={pipeline}" for name, pipeline in models.items()]
    output = tmp_path / "compared"
    assert main(["eval", "--pipeline", *named, *options, "--output", str(output), "--json", str(tmp_path / "t")]) == 0
    assert "kandinsky - playground" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "t").read_text())["values"]) == list(models)
    assert main(["score", "--pipeline", models["kandinsky"], *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("mean of 2")


def test_set_scheduler_kandinsky_decoder(models):
    pipe = baselines.load_pipeline(models["kandinsky"], CPU)
    default, prior = pipe.scheduler, pipe.prior_pipe.scheduler

    def generate():
        generator = torch.Generator().manual_seed(0)
        image = pipe(PROMPTS[0], height=64, width=64, num_inference_steps=2, generator=generator).images[0]
        return to_tensor(image)

    images = {"default": generate()}
    for name in ("dpm++", "ddim"):
        baselines.set_scheduler(pipe, name)
        assert type(pipe.decoder_pipe.scheduler).__name__ == SCHEDULER_CLASSES[name]
        assert pipe.prior_pipe.scheduler is prior
        images[name] = generate()
        pipe.scheduler = default
    pipe.decoder_pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    assert torch.equal(images["ddim"], generate())
    pipe.decoder_pipe.scheduler = default
    assert torch.equal(images["default"], generate()) and not torch.equal(images["default"], images["ddim"])
    for name in ("lcm", "unipc"):  # incompatible (lcm), or a step without generator (unipc)
        with pytest.raises(ValueError, match=f"KandinskyV22CombinedPipeline.*'{name}'"):
            baselines.set_scheduler(pipe, name)


def test_baselines_generate_unsupported_size_raises(models, tmp_path):
    with pytest.raises(ValueError, match=r"KandinskyV22CombinedPipeline.*height 128.* 72;"):
        baselines.generate(models["kandinsky"], PROMPTS[:1], tmp_path, num_steps=1, height=72, width=64, runtime=CPU)


def test_load_pipeline_decoder_without_prior_raises(hub, tmp_path, monkeypatch):
    (decoder,) = hub.glob("*decoder/snapshots/*")
    decoder_only = tmp_path / "decoder"
    shutil.copytree(decoder, decoder_only, ignore=shutil.ignore_patterns("README.md"))
    with pytest.raises(ValueError, match=r"prompt.*README\.md.*prior_prior"):
        baselines.load_pipeline(str(decoder_only), CPU)
    (decoder_only / "README.md").write_text(CARD.replace(PRIOR, "nobody/nothing"))
    with pytest.raises(ValueError, match=r"decoder'.*nobody/nothing"):
        baselines.load_pipeline(str(decoder_only), CPU)
    (prior,) = hub.glob("*prior/snapshots/*")
    (decoder_only / "README.md").write_text(CARD.replace(PRIOR, str(prior)))
    assert type(baselines.load_pipeline(str(decoder_only), CPU)).__name__ == CLASSES["kandinsky"]


def test_load_pipeline_unreadable_sentencepiece_raises(models, tmp_path):
    shutil.copytree(models["pixart"], tmp_path / "pixart", ignore=shutil.ignore_patterns("tokenizer.json"))
    (tmp_path / "pixart" / "tokenizer" / "spiece.model").write_bytes(b"not a vocabulary")
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        baselines.load_pipeline(str(tmp_path / "pixart"), CPU)


def test_message_about_truncated_prompts_is_short():
    def shown(text):
        record = logging.LogRecord("diffusers", logging.WARNING, "", 0, text, (), None)
        assert baselines.shorten_truncation(record)
        return record.getMessage()

    eot, start = (
        "<|endoftext|>",
        "The following part of your input was truncated because CLIP can only handle 77 tokens",
    )
    texts = [f"a fox's {eot}" + eot * 50, eot * 52, f"red . {eot}"]
    assert shown(f"{start}: {texts}") == f'{start}: 2 of 3 prompts, e.g. ["a fox\'s"]'
    assert shown("other") == "other" and shown(f"truncated: [{eot}") == f"truncated: [{eot}"


def test_caption_cleaning_missing_library_warns_once(models, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(baselines, "find_spec", lambda name: None if name == "bs4" else True)
    with caplog.at_level(logging.WARNING, "longalign"):
        baselines.generate(
            models["pixart"], PROMPTS, tmp_path, batch_size=1, num_steps=2, height=64, width=64, runtime=CPU
        )
    (message,) = caplog.messages
    assert "PixArtAlphaPipeline" in message and "pip install beautifulsoup4" in message and "ftfy" not in message
    monkeypatch.setattr(baselines, "find_spec", lambda name: True)
    assert baselines.caption_cleaning_kwargs(baselines.load_pipeline(models["pixart"], CPU)) == {}
    assert baselines.caption_cleaning_kwargs(baselines.load_pipeline(models["playground"], CPU)) == {}
