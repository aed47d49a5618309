"""Configs of vision-language models."""

import pytest
from pydantic import TypeAdapter, ValidationError

from longalign.runtime import Runtime
from longalign.vlm.config import EndpointConfig, JudgeConfig, LocalVLMConfig, VLMConfig

URL = "http://localhost:8000/v1"
parse = TypeAdapter(VLMConfig).validate_python


def problem(value):
    with pytest.raises(ValidationError) as error:
        parse(value)
    return str(error.value)


def test_vlm_config_is_chosen_by_its_keys():
    local, endpoint = parse({"checkpoint": "owner/model"}), parse({"base_url": URL + "/", "model": "m"})
    assert isinstance(local, LocalVLMConfig) and isinstance(endpoint, EndpointConfig)
    assert endpoint.base_url == URL and parse(endpoint) is endpoint
    assert parse(endpoint.model_dump()) == endpoint and parse(local.model_dump()) == local


def test_problems_of_one_class_are_reported():
    assert "checkpoint" not in problem({"base_url": URL, "modle": "m"})
    assert "base_url" not in problem({"checkpont": "owner/model"})


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000", "http://", "http://a:x/v1", "http://a b/", ""])
def test_base_url_must_be_http(url):
    assert "http://localhost" in problem({"base_url": url, "model": "m"})


@pytest.mark.parametrize("url", ["http://user:secret@host/v1", "http://host/v1?key=secret", "http://host/v1#secret"])
def test_base_url_has_no_credentials(url):
    with pytest.raises(ValidationError) as error:
        parse({"base_url": url, "model": "m"})
    [detail] = error.value.errors(include_input=False)
    assert "api_key_env" in detail["msg"] and "secret" not in str(detail)


def test_api_key_env_is_a_name_not_a_key(monkeypatch):
    with pytest.raises(ValidationError) as error:
        parse({"base_url": URL, "model": "m", "api_key_env": "sk-secret"})
    assert "sk-secret" not in str(error.value.errors(include_input=False))
    monkeypatch.delenv("VLM_KEY", raising=False)
    config = parse({"base_url": URL, "model": "m", "api_key_env": "VLM_KEY"})
    [(key, message)] = config.check_files()
    assert key == "api_key_env" and "VLM_KEY" in message
    with pytest.raises(ValueError, match="VLM_KEY"):
        config.build(Runtime())
    monkeypatch.setenv("VLM_KEY", "sk-secret\nsecond line")
    [(_, message)] = config.check_files()
    assert "VLM_KEY" in message and "secret" not in message
    monkeypatch.setenv("VLM_KEY", "sk-secret")
    assert config.check_files() == [] and "sk-secret" not in config.build(Runtime()).identity


def test_parameters_set_by_longalign_are_rejected():
    assert "model, stream" in problem({"base_url": URL, "model": "m", "parameters": {"stream": True, "model": "x"}})


def test_missing_checkpoint_is_a_problem_of_its_key():
    [(key, _)] = LocalVLMConfig(checkpoint="/no/such/folder").check_files()
    assert key == "checkpoint"
    [(key, _)] = JudgeConfig(vlm={"checkpoint": "/no/such/folder"}).check_files()
    assert key == "vlm.checkpoint"


def test_judge_prompt_needs_its_placeholder():
    with pytest.raises(ValidationError, match=r"\{prompt\}"):
        JudgeConfig(vlm={"checkpoint": "owner/model"}, prompt="Which is better?")
