"""Configs of vision-language models. Does not import torch."""

from __future__ import annotations

import os
import re
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, field_validator

from longalign.errors import ConfigError, ConfigProblem, check_size, flatten, nested, redact_url, shorten
from longalign.hub import checkpoint_problem
from longalign.registry import Section
from longalign.runtime import Runtime

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_]\w*")


class _VLMSection(Section):
    #: ``module:class`` of the `longalign.vlm.base.VLM`, imported by `build`
    target: ClassVar[str]

    def check_files(self) -> list[ConfigProblem]:
        """Checks the files and environment variables that the config names, without the network.

        Returns problems as ``(key, message)``; empty if there are none.
        """
        return []

    def build(self, runtime: Runtime) -> Any:
        """Returns the `longalign.vlm.base.VLM`. Loads a local model; sends nothing to an endpoint."""
        module, _, name = type(self).target.partition(":")
        return getattr(import_module(module), name).from_config(self, runtime)


class LocalVLMConfig(_VLMSection):
    """A vision-language model of transformers, run on this machine."""

    target: ClassVar[str] = "longalign.vlm.local:LocalVLM"

    checkpoint: str
    """Hub id or local folder with a vision-language model, its processor and its chat template."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository; null: the default branch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the weights; null: that of ``loop.precision`` in a run, float32 in other commands."""
    batch_size: int = Field(8, ge=1)
    """number of questions per forward pass."""

    def check_files(self) -> list[ConfigProblem]:
        problem = checkpoint_problem(self.checkpoint, ["config.json"], self.revision)
        return [("checkpoint", problem)] if problem else []


class EndpointConfig(_VLMSection):
    """A vision-language model behind an OpenAI-compatible HTTP endpoint (``POST {base_url}/chat/completions``)."""

    target: ClassVar[str] = "longalign.vlm.endpoint:EndpointVLM"

    base_url: str
    """URL up to and including the version, e.g. ``http://localhost:8000/v1``. It must not contain credentials."""
    model: str
    """name of the model at the endpoint."""
    api_key_env: str | None = None
    """name of the environment variable with the API key; null: no key is sent. The key is never written to a file."""
    parameters: dict[str, JsonValue] = Field({"temperature": 0, "max_tokens": 16})
    """further fields of the JSON body of each request, except ``model``, ``messages``, ``stream`` and ``n``."""
    timeout: float = Field(60.0, gt=0)
    """seconds without data from the endpoint after which an attempt has failed."""
    attempts: int = Field(5, ge=1, le=20)
    """maximum number of attempts per request, which is repeated after failed connections, timeouts, rate limits and
    server errors.
    """
    backoff: float = Field(1.0, ge=0, le=3600)
    """seconds to wait before the second attempt, doubled before each further attempt. A longer ``Retry-After`` of the
    endpoint is respected, up to one minute.
    """
    concurrency: int = Field(4, ge=1)
    """maximum number of requests that are sent at the same time."""

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            valid = (
                parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not re.search(r"\s", url)
            )
        except ValueError:
            parts, valid = urlsplit(""), False
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("expected a URL without user, password, query and fragment; use `api_key_env` for a key")
        if not valid:
            raise ValueError(f"expected a URL such as http://localhost:8000/v1, got {redact_url(url)!r}")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, name: str | None) -> str | None:
        if name is not None and not ENVIRONMENT_NAME.fullmatch(name):  # not shown: it could be the key itself
            raise ValueError(
                "expected the name of an environment variable, e.g. OPENAI_API_KEY, not the key itself; export the key "
                "in such a variable"
            )
        return name

    @field_validator("parameters")
    @classmethod
    def _check_parameters(cls, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if reserved := sorted({"model", "messages", "stream", "n"} & parameters.keys()):
            raise ValueError(f"expected no field that longalign sets, got {', '.join(reserved)}; remove them")
        return parameters

    def check_files(self) -> list[ConfigProblem]:
        if self.api_key_env is None:
            return []
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            return [("api_key_env", f"the environment variable {self.api_key_env} is not set; export it, or use null")]
        if not (key.isascii() and key.isprintable()):  # not shown, as it would be by the HTTP client's error
            return [
                ("api_key_env", f"expected a key of printable ASCII characters in {self.api_key_env}; set it again")
            ]
        return []


def _parse(value: Any) -> Any:
    """Validates a mapping as `EndpointConfig` if one of the keys belongs to it only, otherwise as `LocalVLMConfig`.

    So only the problems of one class are reported. Other values are returned unchanged.
    """
    if not isinstance(value, dict):
        return value
    endpoint_keys = EndpointConfig.model_fields.keys() - LocalVLMConfig.model_fields.keys()
    model = EndpointConfig if value.keys() & endpoint_keys else LocalVLMConfig
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise nested(flatten(error, model)) from None


#: a local model (``checkpoint``) or an endpoint (``base_url`` and ``model``)
VLMConfig = Annotated[LocalVLMConfig | EndpointConfig, BeforeValidator(_parse)]


def check_template(text: str, placeholder: str) -> str:
    """Returns ``text`` if it contains ``placeholder``, e.g. ``"{prompt}"``; raises ValueError otherwise."""
    if placeholder not in text:
        raise ValueError(f"expected a text with {placeholder}, got {text!r}; add {placeholder}")
    return text


class JudgeConfig(Section):
    """Settings of a judge: a vision-language model that compares the images of two image models for the same prompt."""

    vlm: VLMConfig
    """the vision-language model: ``checkpoint`` for a local one, or ``base_url`` and ``model`` for an endpoint. It must
    accept two images in one question.
    """
    prompt: str = (
        "These are image 1 and image 2. Both were generated for this text:\n\n{prompt}\n\n"
        "Which image shows more of the details of the text correctly? If both do equally well, which one looks better? "
        "Answer with one word: 1, 2 or tie."
    )
    """question to the vision-language model, sent after both images. ``{prompt}`` is replaced by the prompt of the
    images. The model must answer ``1`` or ``2`` (the better image) or ``tie``.
    """
    cache: str | None = "~/.cache/longalign/judge"
    """folder in which answers are stored, so that an interrupted command resumes; null: answers are not stored."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        return check_template(prompt, "{prompt}")

    @classmethod
    def parse(cls, value: Any) -> JudgeConfig:
        """Returns the config from a mapping, e.g. of a YAML file; checks the files and environment variables it names.

        Raises:
            ConfigError: with all invalid values or, if all values are valid, with all problems of files and variables.
        """
        check_size(value)
        if not isinstance(value, dict):
            raise ConfigError([("", f"expected a mapping with 'vlm', got {shorten(value)}; write vlm: {{...}}")])
        try:
            config = cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(flatten(error, cls)) from error
        if problems := config.check_files():
            raise ConfigError(problems)
        return config

    def check_files(self) -> list[ConfigProblem]:
        """Checks the files and environment variables that ``vlm`` names, without the network.

        Returns problems as ``(key, message)``; empty if there are none.
        """
        return [(f"vlm.{key}", problem) for key, problem in self.vlm.check_files()]
