"""Config of the reward `hpsv3`. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from longalign.errors import ConfigProblem, shorten
from longalign.hub import availability_problem, checkpoint_problem
from longalign.rewards.config import RewardConfig

#: file of the weights
WEIGHTS = "HPSv3.safetensors"
PLACEHOLDER, REWARD_TOKEN = "{text_prompt}", "<|Reward|>"


class Hpsv3Config(RewardConfig):
    """HPSv3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL-7B, fine-tuned on human preferences.

    The model reads the image and an instruction with the prompt. It predicts the mean and the standard deviation of the
    preference; the mean, an unbounded number, is the score. Prompts are not truncated.
    """

    target: ClassVar[str] = "longalign.rewards.hpsv3.reward:Hpsv3Reward"

    name: Literal["hpsv3"] = "hpsv3"
    checkpoint: str = "MizzenAI/HPSv3"
    """Hub id or local folder with ``HPSv3.safetensors``, or the path of this file."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository of ``checkpoint``; null: its main branch."""
    base: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Hub id or local folder of the model that HPSv3 was trained from. Its config, tokenizer, image processor and chat
    template are used, but not its weights.
    """
    instruction: str
    """the instruction with which HPSv3 was trained, or the path of a text file with the instruction. The text contains
    ``{text_prompt}``, which is replaced by the prompt, and then ``<|Reward|>``, at which the score is predicted. In the
    authors' code it is ``INSTRUCTION + prompt_with_special_token`` of ``hpsv3/dataset/data_collator_qwen.py``.
    """
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the weights, except those of the output head, which are float32. null: that of ``loop.precision`` in a
    run, float32 in other commands.
    """
    micro_batch: int | None = Field(None, ge=1)
    """number of images per pass of the model; fewer need less memory. null: all images at once."""

    @field_validator("instruction")
    @classmethod
    def _check_instruction(cls, instruction: str) -> str:
        if _is_text(instruction) and (problem := template_problem(instruction)):
            raise ValueError(problem)
        return instruction

    def template(self) -> str:
        """Returns the text of the instruction, read from a file if ``instruction`` is a path.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if the text does not contain ``{text_prompt}`` and then ``<|Reward|>``, each once.
        """
        if _is_text(self.instruction):
            return self.instruction
        text = Path(self.instruction).read_text(encoding="utf-8")
        if problem := template_problem(text):
            raise ValueError(f"{self.instruction}: {problem}")
        return text

    def check_files(self) -> list[ConfigProblem]:
        if Path(self.checkpoint).suffix == ".safetensors":
            problem = f"no file {self.checkpoint}; expected the path of {WEIGHTS}, or a Hub id or folder with this file"
            problem = "" if Path(self.checkpoint).is_file() else problem
        else:
            problem = checkpoint_problem(self.checkpoint, [WEIGHTS], self.revision)
        problems = [("checkpoint", problem), ("base", availability_problem(self.base))]
        try:
            self.template()
        except (OSError, ValueError) as error:
            problems.append(("instruction", f"expected a text with {PLACEHOLDER}, or the path of a text file: {error}"))
        return [(key, problem) for key, problem in problems if problem]


def _is_text(instruction: str) -> bool:
    return "\n" in instruction or PLACEHOLDER in instruction or REWARD_TOKEN in instruction


def template_problem(text: str) -> str:
    """Returns why a text cannot be the instruction of HPSv3, or an empty string if it can."""
    before, *after = text.split(PLACEHOLDER)
    if len(after) == 1 and REWARD_TOKEN not in before and after[0].count(REWARD_TOKEN) == 1:
        return ""
    return f"expected one {PLACEHOLDER} and after it one {REWARD_TOKEN}, got {shorten(text)}"
