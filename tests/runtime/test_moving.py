import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError
from precision_runtime.runtime import PrecisionRuntime
from precision_runtime.setup.moving import move

CPU, META = torch.device("cpu"), torch.device("meta")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight


def stepped(model):
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.a(torch.ones(1, 2)).sum().backward()
    opt.step()
    return opt


# Like XLA, the meta device takes no parameter over: ``model.to`` makes new ones.
def test_where_parameters_are_new_objects_ties_and_optimizers_follow():
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


def test_a_model_that_is_there_is_not_touched(monkeypatch):
    monkeypatch.setattr(nn.Module, "to", lambda *args: pytest.fail("moved"))
    move(Tied(), CPU, [])


@pytest.mark.parametrize("mode", ["bf16-true", "16-mixed", "nf4", "transformer-engine", "apex-O2", "32-true"])
def test_a_model_without_values_is_refused_before_anything_is_done(mode):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).to("meta")
    runtime = PrecisionRuntime(mode, "cpu")
    message = (
        "Sequential has tensors on the meta device.*to cpu: '0.weight', '0.bias', '1.weight' and 3 more.*init_module"
    )
    with pytest.raises(ConfigurationError, match=message):
        runtime.setup(model)
    assert all(type(part) is nn.Linear for part in model)
    assert runtime.plan(model).rows
