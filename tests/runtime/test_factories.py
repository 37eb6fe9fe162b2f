"""What the commands work on is found, made and checked before anything runs."""

import sys

import pytest
import torch
from torch import nn

from precision_runtime.errors import ConfigurationError, UnknownNameError
from precision_runtime.factories import find_factory, make, parse_input

SOURCE = """
import torch
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
    @classmethod
    def small(cls):
        return cls()

number = 3

def alone():
    return nn.Linear(4, 2)

def args():
    return nn.Linear(4, 2), (torch.ones(1, 4),)

def everything():
    return nn.Linear(4, 2), [torch.ones(1, 4)], {"x": 1}

def kwargs():
    return nn.Linear(4, 2), {"input": torch.ones(1, 4)}

def nothing(): ...

def wrong():
    return nn.Linear(4, 2), torch.ones(1, 4)

def raises():
    import absent_package
"""


@pytest.fixture(autouse=True)
def made_here(tmp_path, monkeypatch):
    (tmp_path / "nets_of_a_test.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("nets_of_a_test"):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["nets_of_a_test", "nets_of_a_test.py"])
def test_a_factory_is_found_by_module_and_by_file(place):
    assert isinstance(find_factory(f"{place}:alone")(), nn.Linear)
    assert isinstance(find_factory(f"{place}:Net.small")(), nn.Linear)


@pytest.mark.parametrize(
    ("factory", "args", "kwargs"),
    [("alone", 0, []), ("Net", 0, []), ("args", 1, []), ("everything", 1, ["x"]), ("kwargs", 0, ["input"])],
)
def test_what_it_returns_is_taken_apart(factory, args, kwargs):
    made = make(f"nets_of_a_test:{factory}")
    assert isinstance(made.function, nn.Linear)
    assert (len(made.args), list(made.kwargs)) == (args, kwargs)


def test_values_and_inputs_depend_on_the_seed_alone():
    first, again, other = (make("nets_of_a_test:Net", ["3x4"], seed) for seed in (1, 1, 2))
    assert torch.equal(first.args[0], again.args[0])
    assert torch.equal(first.function.weight, again.function.weight)
    assert not torch.equal(first.args[0], other.args[0])
    assert not torch.equal(first.function.weight, other.function.weight)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nets_of_a_test", "names no factory"),
        ("absent_module:f", "no module 'absent_module' can be found"),
        ("nets_of_a_test.inner:f", r"no module 'nets_of_a_test\.inner' can be found"),
        ("absent.py:f", r"no file 'absent\.py'"),
        ("nets_of_a_test:number", "is int and cannot be called"),
        ("nets_of_a_test:nothing", "it returned None"),
        ("nets_of_a_test:wrong", "it returned Linear, Tensor"),
    ],
)
def test_what_cannot_be_used_is_refused(name, said):
    with pytest.raises(ConfigurationError, match=said):
        make(name)


def test_a_misspelt_factory_is_answered_with_those_that_are_there():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'alone'\?\nKnown attributes: Net, alone"):
        find_factory("nets_of_a_test:alon")


def test_a_package_that_their_code_lacks_is_their_error():
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        make("nets_of_a_test:raises")


def test_inputs_given_twice_are_refused():
    with pytest.raises(ConfigurationError, match="makes its inputs itself"):
        make("nets_of_a_test:args", ["1x4"])


@pytest.mark.parametrize(
    ("text", "key", "shape", "dtype"),
    [
        ("4x64", "", (4, 64), torch.float32),
        ("x=2,3:float64", "x", (2, 3), torch.float64),
        ("scalar", "", (), torch.float32),
        ("ids=5:int64<7", "ids", (5,), torch.int64),
        ("mask=2x2:bool", "mask", (2, 2), torch.bool),
        ("3:complex64", "", (3,), torch.complex64),
    ],
)
def test_an_input_is_made_as_written(text, key, shape, dtype):
    name, tensor = parse_input(text)
    assert (name, tuple(tensor.shape), tensor.dtype) == (key, shape, dtype)


def test_whole_numbers_stay_below_their_limit():
    _, tensor = parse_input("1000:int64<3")
    assert set(tensor.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("text", ["", "4x", "x=", "4x4:int64", "4x4:int64<0", "a-b=4"])
def test_another_form_is_refused(text):
    with pytest.raises(ConfigurationError, match="--input"):
        parse_input(text)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'float32'"):
        parse_input("4:float23")
