import pytest
import torch
from torch import nn

from precision_runtime.moving import move

CPU, META = torch.device("cpu"), torch.device("meta")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight


@pytest.fixture
def anew():
    """As on XLA: a move makes new parameters."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def stepped(model):
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.a(torch.ones(1, 2)).sum().backward()
    opt.step()
    return opt


def test_where_parameters_are_new_objects_ties_and_optimizers_follow(anew):
    model = Tied()
    opt, before = stepped(model), model.a.weight
    momentum = opt.state[before]["momentum_buffer"]
    move(model, META, [opt])
    assert model.a.weight is not before
    assert model.a.weight is model.b.weight
    assert model.a.weight.device == META
    assert [id(p) for p in opt.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert opt.state[model.a.weight]["momentum_buffer"] is momentum
    assert before not in opt.state


def test_where_they_stay_the_same_nothing_else_happens():
    model = Tied()
    opt, before = stepped(model), list(model.parameters())
    move(model, META, [opt])
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.device == META for p in model.parameters())


def test_a_model_that_is_there_is_not_touched(monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda *args: pytest.fail("moved"))
    move(Tied(), CPU, [])
