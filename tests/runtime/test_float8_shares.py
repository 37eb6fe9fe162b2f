"""Shares of underflow and saturation."""

import pytest
import torch
from torch import nn

from precision_runtime.float8 import Share, shares, watching
from precision_runtime.float8.layers import become_float8
from precision_runtime.float8.recipes import RECIPES


def model():
    torch.manual_seed(0)
    return nn.Sequential(become_float8(nn.Linear(16, 16)), nn.Linear(16, 16), become_float8(nn.Linear(16, 16)))


def test_what_vanishes_and_what_is_clamped_is_counted_per_layer_and_tensor():
    net = model()
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        net[0].weight[0, :4] = 2.0**-11  # a quarter of E4M3's smallest number: becomes 0
    x = torch.ones(2, 16)
    x[0, :3], x[1, 0] = 500.0, 0.0  # three beyond 448; a zero that was one before is no loss
    with watching() as found:
        net(x).backward(torch.full((2, 16), 2.0**-18))  # below half of E5M2's smallest number, 2^-16
    assert set(found.by_name(net)) == {"0", "2"}
    assert found.of(net[0])["input"] == Share(elements=32, underflow=0, saturation=3)
    assert found.of(net[0])["weight"] == Share(elements=256, underflow=4, saturation=0)
    assert found.of(net[2])["gradient"] == Share(elements=32, underflow=32, saturation=0)
    assert found.of(net[2])["gradient"].underflow_share == 1
    assert found.of(net[0])["input"].saturation_share == 3 / 32
    assert found.of(net[1]) == {}


def test_calls_add_up_and_watchers_count_for_themselves():
    layer = become_float8(nn.Linear(16, 16))
    with watching() as outer:
        layer(torch.ones(1, 16))
        with watching() as inner:
            layer(torch.ones(1, 16))
    layer(torch.ones(1, 16))
    assert outer.of(layer)["input"].elements == 32
    assert inner.of(layer)["input"].elements == 16


def test_nothing_is_counted_when_nobody_watches_and_an_error_ends_the_watch(monkeypatch):
    with pytest.raises(KeyError), watching():
        raise KeyError
    monkeypatch.setattr(shares, "count", None)  # calling it would raise
    become_float8(nn.Linear(16, 16))(torch.ones(1, 16))
    assert not shares.watched()


@pytest.mark.parametrize("recipe", RECIPES)
def test_watching_changes_no_number_and_every_tensor_is_counted_once(recipe):
    torch.manual_seed(0)
    layer = become_float8(nn.Linear(128, 128), recipe)
    x = torch.randn(24, 128)
    results = []
    for watch in (False, True):
        layer.zero_grad()
        layer.forget()
        torch.manual_seed(1)
        if watch:
            with watching() as found:
                y = layer(x)
                y.sum().backward()
        else:
            y = layer(x)
            y.sum().backward()
        results.append((y, layer.weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    sizes = {name: share.elements for name, share in found.of(layer).items()}
    rows = 32 if recipe == "NVFP4BlockScaling" else 24  # rotated: filled up to whole blocks of 16
    assert sizes == {"input": 24 * 128, "weight": 128 * 128, "gradient": rows * 128}
