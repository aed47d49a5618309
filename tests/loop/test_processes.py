"""Two processes train as one process does with the same global batch."""

import json

import launched
import pytest
import torch
from launched import lines
from safetensors.torch import load_file

from longalign.testing.tiny import tiny_clip

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Output folders of the runs with two processes and with one."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    for folder in (two, one):
        tiny_clip(folder / "clip", width=8)
    launched.launch(two, "--multi_gpu")
    with launched.registered():
        for configs in (launched.configs, launched.pair_configs):
            launched.train(one, configs=configs)
    return two, one


@pytest.mark.parametrize("kind", ["align", "reward", "lcm", "denscore"])
def test_losses_and_weights_equal_one_process(outputs, kind):
    checkpoints = launched.assert_equal_runs(*(folder / kind for folder in outputs))
    long = kind in ("align", "reward")
    assert set(checkpoints) == ({"checkpoint-000002", "checkpoint-000004"} if long else {"checkpoint-000002"})
    if long:
        assert all(any(k.startswith("encoder.") for k in weights) for weights in checkpoints.values())


def test_preference_model_equals_one_process(outputs):
    start = load_file(outputs[0] / "clip" / "model.safetensors")
    two, one = (
        load_file(folder / "denscore" / "checkpoint-000002" / "reward" / "model.safetensors") for folder in outputs
    )
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert any((one[name] - start[name]).abs().max() > 1e-3 for name in one)


def test_common_direction_spans_all_processes(outputs):
    two, one = (lines(folder / "reward") for folder in outputs)
    assert {"0/eta", "1/eta", "0/text_relevant", "pretraining_loss"} <= two[0].keys()
    assert [line["1/eta"] for line in two] == pytest.approx([line["1/eta"] for line in one], rel=1e-5)


def test_gradients_are_exchanged_once_per_step(outputs):
    results = json.loads((outputs[0] / "results-0.json").read_text())
    for kind, steps in (("first_half", 2), ("align", 2), ("reward", 4)):
        assert results[kind]["modules"] == 2
        assert results[kind]["exchanged"] == steps * results[kind]["modules"]
    assert (results["denscore"]["modules"], results["denscore"]["exchanged"]) == (1, 2)


def test_seeds_differ_by_process_and_only_main_process_writes(outputs):
    folder = outputs[0]
    seeds = [json.loads((folder / f"results-{rank}.json").read_text())["reward"]["seed"] for rank in range(2)]
    assert seeds == [0, 1]
    assert [line["step"] for line in lines(folder / "align")] == [0, 1, 2, 2, 3, 4, 4]
    assert [line["step"] for line in lines(folder / "align") if "monitor/red" in line] == [0, 2, 4]
    assert [p.name for p in sorted((folder / "align" / "monitor").iterdir())] == ["000000", "000002", "000004"]
    resume = folder / "align" / "checkpoint-000004" / "resume"
    assert sorted(p.name for p in resume.iterdir()) == ["process-0.pt", "process-1.pt", "shared.pt"]
