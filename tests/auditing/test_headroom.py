"""``headroom``: bits of scale until something fails, each of them checked by an audit or a cast of its own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from precision_runtime import Headroom, audit, headroom
from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.ranging import Room


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


class Length(nn.Module):
    """x over its length by the squares: they leave float16's range long before x does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.square().sum(-1, keepdim=True).sqrt()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), Length(), nn.Linear(16, 4))


def test_the_bits_of_inputs_are_the_last_power_that_an_audit_lets_pass() -> None:
    net, x = network(), torch.randn(4, 8)
    found = headroom(net, x, mode="16-true", limit=12, gradients=False)
    up = {r.module: r.up for r in found.rows if r.axis == "inputs"}["1"]
    assert up is not None
    assert audit(net, x * 2.0**up, mode="16-true", gradients=False).ok
    report = audit(net, x * 2.0 ** (up + 1), mode="16-true", gradients=False)
    assert "1" in {f.module for f in report.findings}
    assert found.bits <= up
    assert found.room("1") == min(r.bits for r in found.rows if r.module == "1" and r.bits is not None)


def test_where_the_format_has_range_there_is_no_edge() -> None:
    found = headroom(network(), torch.randn(4, 8), mode="bf16-true", limit=8)
    assert found.bits == found.limit == 8
    assert found.tightest is None
    assert "more than 8 bits" in str(found)


def test_what_fails_already_has_minus_one() -> None:
    found = headroom(Length(), torch.randn(4, 8) * 300, mode="16-true", gradients=False, limit=4)
    assert found.bits == -1
    assert not audit(Length(), torch.randn(4, 8) * 300, mode="16-true", gradients=False).ok
    assert "fails now" in str(found)


def test_values_go_by_the_largest_and_by_what_a_cast_loses() -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), torch.randn(4, 8) * 40
    found = headroom(net, x, mode="16-true", gradients=False, limit=16)
    (row,) = (r for r in found.rows if r.axis == "values" and r.module == "0")
    with torch.no_grad():
        y = net.double()[0](x.double())
    assert row.up is not None
    assert bool((y * 2.0**row.up).half().isfinite().all())
    assert not bool((y * 2.0 ** (row.up + 1)).half().isfinite().all())
    assert row.format == "float16"
    assert row.above == "range"


def test_under_autocast_a_module_is_measured_by_the_dtype_that_it_returns() -> None:
    class Wide(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() * 1e6

    net = nn.Sequential(nn.Linear(8, 8), Wide())
    found = headroom(net, torch.randn(4, 8), mode="16-mixed", gradients=False, limit=10)
    formats = {r.module: r.format for r in found.rows if r.axis == "values"}
    assert formats["0"] == "float16"
    assert formats["1"] == "float32"
    assert found.room("1", axis="values") is None


def test_gradients_are_measured_where_a_scaler_settles() -> None:
    class Faint(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2.0**-22

    net, x = nn.Sequential(nn.Linear(8, 8), Faint()), torch.rand(64, 8)
    plain = headroom(net, x, mode="16-true", limit=8)
    scaled = headroom(net, x, mode="16-mixed", limit=8)
    back = {r.module: r for r in plain.rows if r.axis == "values" and r.where == "backward"}
    assert back["0"].down == -1  # subnormal in float16
    assert back["0"].below == "underflow"
    # The largest gradient is the audit's own, 0.75 to 1.25 for each output: doubled 15 times it still fits.
    assert 1.25 * 2.0**15 < 65504.0 < 1.0 * 2.0**16
    assert scaled.figures["loss_scale"] == 2.0**15
    low = {r.module: r for r in scaled.rows if r.axis == "values" and r.where == "backward"}["0"]
    assert low.up is None  # the scaler follows
    assert low.down is None or low.down > 0


def test_activations_are_scaled_one_module_at_a_time() -> None:
    net, x = network(), torch.randn(4, 8)
    found = headroom(net, x, mode="16-true", gradients=False, activations="[01]", limit=12)
    rows = {(r.module, r.where): r for r in found.rows if r.axis == "activations"}
    up = rows["0", "forward"].up
    assert up is not None

    class Louder(nn.Module):
        def __init__(self, power: int) -> None:
            super().__init__()
            self.power = power

        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return t * 2.0**self.power

    for power, holds in ((up, True), (up + 1, False)):
        louder = nn.Sequential(net[0], Louder(power), net[1], net[2])
        assert audit(louder, x, mode="16-true", gradients=False).ok is holds
    assert rows["1", "forward"].up is None  # what follows is a Linear, which takes any scale


def test_everything_is_as_before_also_where_the_code_raises() -> None:
    net, x = network(), torch.randn(4, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    kept = x.clone()
    headroom(net, x, mode="16-true", activations="*", limit=2)
    calls = []

    class Refuses(nn.Module):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            calls.append(t)
            if float(t.detach().abs().max()) > 100.0:
                raise ValueError("too large")
            return t

    refusing = nn.Sequential(Refuses())
    with pytest.raises(ValueError, match="too large"):
        headroom(refusing, torch.ones(2, 2), mode="16-true", limit=16)
    assert calls
    for model in (net, refusing):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_without_floating_inputs_there_is_nothing_to_scale_and_a_note_says_so() -> None:
    found = headroom(nn.Embedding(8, 4), torch.tensor([1, 2]), mode="16-true", gradients=False, limit=4)
    assert any("no floating input" in note for note in found.notes)
    assert {r.axis for r in found.rows} == {"values"}


def test_the_result_is_plain_data_and_comes_back() -> None:
    found = headroom(network(), torch.randn(4, 8), mode="16-true", gradients=False, limit=6)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["bits"] == found.bits
    again = Headroom.from_dict(data)
    assert again == found
    assert str(again) == str(found)


def test_the_text_names_what_fails_first() -> None:
    rows = (
        Room("inputs", "norm", "Norm", "forward", up=3, above="range"),
        Room("values", "out", "Linear", "forward", 9),
    )
    found = Headroom("Block", "16-true", "cpu", "native", 16, rows)
    assert found.bits == 3
    assert str(found).splitlines()[0] == (
        "Block in 16-true on cpu: 3 bits of headroom; then range in norm (Norm), forward (inputs doubled)"
    )
    halved = Headroom(
        "Block", "16-true", "cpu", "native", 16, (Room("inputs", "", "", "forward", 5, 1, "x", "underflow"),)
    )
    assert "1 bit of headroom; then underflow in the whole function, forward (inputs halved)" in str(halved)


@pytest.mark.parametrize("limit", [0, 65, 2.5])
def test_a_limit_that_makes_no_sense_is_refused(limit: float) -> None:
    with pytest.raises(ConfigurationError, match="limit"):
        headroom(network(), torch.randn(2, 8), mode="16-true", limit=limit)  # type: ignore[arg-type]


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="norm"):
        headroom(network(), torch.randn(2, 8), mode="16-true", activations="norm")
