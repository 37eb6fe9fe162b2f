"""Modules of torch.jit keep attributes in C++, unseen by ``vars()``: each run starts from the same ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from precision_runtime import audit
from precision_runtime.auditing.executing.failing import first_line
from precision_runtime.auditing.executing.originals import Originals
from precision_runtime.auditing.executing.scripted import script_attributes, set_script_attribute
from precision_runtime.auditing.executing.worlds import Worlds


class Remembers(nn.Module):
    """A recurrent cell that keeps its state, a count, a list and the end of its input, as speech detectors do."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(12, 8)
        self.register_buffer("window", torch.hann_window(12))
        self.state, self.context = torch.zeros(0), torch.zeros(0)
        self.count, self.name, self.past, self.table = 0, "cell", [torch.zeros(1)], {"last": torch.zeros(1)}
        self.bad = bad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.count == 0:
            self.context = torch.zeros(x.shape[0], 4)
            self.state = torch.zeros(2, x.shape[0], 8).to(x.device)
        x = torch.cat([self.context.to(x.dtype), x], 1)
        h, c = self.cell((x * self.window).to(x.dtype), (self.state[0].to(x.dtype), self.state[1].to(x.dtype)))
        self.state = torch.stack([h, c])
        self.context = x[:, -4:]
        self.count += 1
        self.past.append(x.sum().detach())
        self.table["last"].add_(1.0)
        if self.bad:
            y = h + 30.0
            return (y * y).mean(-1) - y.mean(-1) ** 2
        return h


def scripted(bad: bool = False) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return torch.jit.script(Remembers(bad))


def told(module: nn.Module) -> dict[str, Any]:
    """What the attributes say, as plain Python."""
    tensors = {"state": module.state, "context": module.context, "last": module.table["last"]}
    plain = {"count": module.count, "name": module.name, "past": [t.tolist() for t in module.past]}
    return plain | {name: t.tolist() for name, t in tensors.items()}


def test_all_attributes_are_found_and_no_buffers() -> None:
    assert set(script_attributes(scripted())) == {"state", "context", "count", "name", "past", "table", "bad"}
    assert script_attributes(nn.Linear(2, 2)) == {}


def test_an_attribute_is_given_another_value() -> None:
    module = scripted()
    set_script_attribute(module, "count", 3)
    set_script_attribute(module, "past", [])
    assert (module.count, module.past) == (3, [])


def test_each_world_starts_from_the_same_attributes_and_all_come_back() -> None:
    module = scripted()
    before, state = told(module), module.state
    worlds = Worlds({"": module}, Originals())
    worlds.note_low()
    for world in (worlds.low, worlds.true):
        with world():
            assert told(module) == before
            module(torch.ones(2, 8, dtype=next(module.parameters()).dtype))
            changed = worlds.changed_state([module])
            names = {name for _, name in changed}
            assert names >= {"state", "context", "count", "past", "table"}
            assert told(module) != before
    with worlds.true(state=changed):  # as a replay of a call starts
        assert module.count == 1
        assert module.state.dtype == torch.float64
        assert len(module.past) == 2
    worlds.restore()
    assert told(module) == before
    assert module.state is state


@pytest.mark.parametrize(("mode", "bad"), [("bf16-mixed", False), ("16-true", False), ("16-true", True)])
@pytest.mark.parametrize("inside", [False, True])
def test_a_scripted_module_with_a_state_is_judged(mode: str, bad: bool, inside: bool) -> None:
    module = scripted(bad)
    before = told(module)
    function = nn.Sequential(nn.Linear(8, 8), module) if inside else module
    x = torch.randn(5, 8)
    report = audit(function, x, mode=mode)
    assert report.ok is not bad, report
    assert told(module) == before
    again = audit(function, x, mode=mode)
    assert again.to_dict() == report.to_dict(), "what an audit leaves behind would change the next one"


class Steps(nn.Module):
    """Calls a scripted module three times: the second and the third start from what it remembers."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Identity(), part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.inner(piece) for piece in x.unbind(1)])


def test_later_calls_start_from_what_earlier_ones_left() -> None:
    report = audit(Steps(scripted()), torch.randn(5, 3, 8), mode="16-true", gradients=False)
    assert report.ok, report
    assert not [r for r in report.remarks if r.kind == "not-judged"], report.remarks


def test_an_error_in_the_interpreter_is_told_by_what_it_says() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.float())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = torch.jit.script(Casts())
    report = audit(module, torch.randn(2, 4), mode="16-true")
    (finding,) = report.findings
    assert finding.kind == "error"
    assert "TorchScript failed in `return F.linear(input, self.weight, self.bias)`" in finding.message
    with pytest.raises(RuntimeError) as caught:
        module.half()(torch.randn(2, 4))
    assert first_line(caught.value).endswith("`: mat1 and mat2 must have the same dtype, but got Float and Half")
    assert first_line(ValueError("a: b\nc")) == "a: b"
    assert first_line(ValueError()) == ""
