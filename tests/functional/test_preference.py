import math

import pytest
import torch

from longalign.functional import preference

TEXT = torch.tensor([[0.6, 0.8, 0.0], [0.6, -0.8, 0.0]])
V = torch.tensor([1.0, 0.0, 0.0])
IMAGE = torch.tensor([[0.0, 1.0, 0.0], [0.8, 0.0, 0.6]])


def test_common_direction_is_normalized_mean():
    assert torch.allclose(preference.common_direction(TEXT), V)
    skewed = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert torch.allclose(preference.common_direction(skewed), torch.tensor([0.6, 0.8]))


def test_eta_and_perpendicular_values():
    assert torch.allclose(preference.eta(TEXT, V), torch.tensor([0.6, 0.6]))
    assert torch.allclose(preference.perpendicular(TEXT, V), torch.tensor([[0.0, 0.8, 0.0], [0.0, -0.8, 0.0]]))


def test_perpendicular_plus_eta_v_equals_text():
    text = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = preference.common_direction(text)
    rebuilt = preference.perpendicular(text, v) + preference.eta(text, v)[:, None] * v
    torch.testing.assert_close(rebuilt, text)
    assert (preference.perpendicular(text, v) @ v).abs().max() < 1e-12


def test_reweight_scales_only_component_along_v():
    assert torch.equal(preference.reweight(TEXT, V, 1.0), TEXT)
    assert torch.allclose(preference.reweight(TEXT, V, 0.0) @ V, torch.zeros(2))
    assert torch.allclose(preference.reweight(TEXT, V, 0.5), torch.tensor([[0.3, 0.8, 0.0], [0.3, -0.8, 0.0]]))


def test_decompose_values():
    parts = preference.decompose(IMAGE, TEXT, V)
    assert torch.allclose(parts.relevant, torch.tensor([0.8, 0.0]))
    assert torch.allclose(parts.irrelevant, torch.tensor([0.0, 0.48]))
    assert torch.allclose(parts.eta, torch.tensor([0.6, 0.6]))
    assert torch.allclose(parts.relevant + parts.irrelevant, (IMAGE * TEXT).sum(-1))


def test_strict_relevance_normalizes_perpendicular_part():
    assert torch.allclose(preference.strict_relevance(IMAGE, TEXT, V), torch.tensor([1.0, 0.0]))
    assert torch.equal(preference.strict_relevance(IMAGE[:1], V[None], V), torch.zeros(1))


def test_running_mean_weights_rows_equally():
    mean, count = torch.zeros(2), torch.tensor(0)
    mean, count = preference.running_mean(mean, count, torch.tensor([[1.0, 0.0]]))
    assert torch.equal(mean, torch.tensor([1.0, 0.0]))
    mean, count = preference.running_mean(mean, count, torch.tensor([[4.0, 3.0], [1.0, 3.0]]))
    assert torch.allclose(mean, torch.tensor([2.0, 2.0]))
    assert count.item() == 3


def test_common_direction_rejects_zero_or_nan_mean():
    with pytest.raises(ValueError, match=r"norm 0\.0"):
        preference.common_direction(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with pytest.raises(ValueError, match="norm nan"):
        preference.normalize(torch.tensor([math.nan, 1.0]))
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        preference.common_direction(torch.ones(3))
