"""Tensors in nested containers and objects: listed in a stable order, rebuilt with aliasing kept."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precision_runtime.tree import leaves, map_tensors

Point = namedtuple("Point", ["x", "y"])


@dataclass
class Record:
    a: Any
    b: Any = None


@dataclass(frozen=True)
class Frozen:
    a: Any


class Cache:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Output(OrderedDict):  # type: ignore[type-arg]
    """A mapping with attributes of its own, as Hugging Face outputs are."""


def t(value: float = 1.0) -> torch.Tensor:
    return torch.tensor(value)


def double(value: torch.Tensor) -> torch.Tensor:
    return value * 2


LEAVES = st.one_of(
    st.integers(-9, 9).map(lambda v: torch.tensor(float(v))), st.none(), st.text(max_size=2), st.integers()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
        st.tuples(inner, inner).map(lambda p: Point(*p)),
        st.tuples(inner, inner).map(lambda p: Record(*p)),
        inner.map(lambda v: Cache(value=v)),
    ),
    max_leaves=8,
)


def plain(value: Any) -> Any:
    """A slow twin's view: types, structure, and numbers in place of tensors."""
    if isinstance(value, torch.Tensor):
        return ("tensor", float(value))
    if isinstance(value, dict):
        return (type(value), {k: plain(v) for k, v in value.items()})
    if isinstance(value, (list, tuple, deque)):
        return (type(value), [plain(v) for v in value])
    if isinstance(value, (Record, Cache)):
        return (type(value), {k: plain(v) for k, v in vars(value).items()})
    return value


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_a_map_by_the_identity_is_an_equal_tree_and_its_leaves_are_the_same_objects(tree: Any) -> None:
    made = map_tensors(lambda x: x, tree)
    assert plain(made) == plain(tree)
    ours, theirs = list(leaves(made)), list(leaves(tree))
    assert [p for p, _ in ours] == [p for p, _ in theirs]
    assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_a_map_changes_every_listed_tensor_once_and_the_original_not_at_all(tree: Any) -> None:
    before = plain(tree)
    made = map_tensors(double, tree)
    assert plain(tree) == before
    assert [float(x) for _, x in leaves(made)] == [2 * float(x) for _, x in leaves(tree)]


def test_paths_read_like_python() -> None:
    tree = {"a": [t(), (t(),)], "b": Point(t(), Record(t(), "text")), 3: Cache(k=t())}
    assert [p for p, _ in leaves(tree)] == ["['a'][0]", "['a'][1][0]", "['b'].x", "['b'].y.a", "[3].k"]
    assert [p for p, _ in leaves(t())] == [""]


def test_objects_are_searched_only_where_asked_for() -> None:
    tree = [Cache(k=t()), t()]
    assert len(list(leaves(tree))) == 2
    assert len(list(leaves(tree, objects=False))) == 1
    assert map_tensors(double, tree, objects=False)[0] is tree[0]
    assert map_tensors(double, tree)[0] is not tree[0]
    assert float(tree[0].k) == 1.0


@pytest.mark.parametrize("kind", [list, tuple, deque, Record, Frozen, Cache])
def test_one_object_in_two_places_stays_one_object(kind: Any) -> None:
    inner = {
        list: lambda: [t()], tuple: lambda: (t(),), deque: lambda: deque([t()]),
        Record: lambda: Record(t()), Frozen: lambda: Frozen(t()), Cache: lambda: Cache(a=t()),
    }[kind]()  # fmt: skip
    made = map_tensors(double, {"first": inner, "second": inner})
    assert made["first"] is made["second"]
    assert made["first"] is not inner


def test_one_tensor_in_two_places_is_mapped_once() -> None:
    calls = []
    x = t()
    made = map_tensors(lambda v: calls.append(v) or v * 2, [x, (x,)])  # type: ignore[func-returns-value]
    assert made[0] is made[1][0]
    assert len(calls) == 1


def test_a_memo_carries_aliasing_across_calls() -> None:
    x, memo = t(), {}  # type: ignore[var-annotated]
    assert map_tensors(double, [x], memo=memo)[0] is map_tensors(double, (x,), memo=memo)[0]


def test_cycles_end() -> None:
    cycle: list[Any] = [t()]
    cycle.append(cycle)
    assert len(list(leaves(cycle))) == 1
    made = map_tensors(double, cycle)
    assert made[1] is made
    cache = Cache(k=t())
    cache.me = cache  # type: ignore[attr-defined]
    assert map_tensors(double, cache).me.me.k == 2


def test_bounded_deques_read_only_mappings_and_outputs_keep_their_type() -> None:
    queue = map_tensors(double, deque([t(), t()], maxlen=2))
    assert (queue.maxlen, [float(x) for x in queue]) == (2, [2.0, 2.0])
    proxy = map_tensors(double, MappingProxyType({"a": t()}))
    assert type(proxy) is MappingProxyType
    assert proxy["a"] == 2
    output = map_tensors(double, Output(logits=t(), hidden=(t(),)))
    assert type(output) is Output
    assert list(output) == ["logits", "hidden"]
    assert type(map_tensors(double, torch.max(torch.ones(2, 2), 0))).__name__ == "max"


def test_packed_sequences_are_rebuilt() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    made = map_tensors(lambda x: x * 2 if x.is_floating_point() else x, packed)
    assert type(made) is nn.utils.rnn.PackedSequence
    assert made.data.eq(2).all()
    assert torch.equal(made.batch_sizes, packed.batch_sizes)


def test_modules_classes_and_functions_are_shared() -> None:
    tree = [nn.Linear(1, 1), Cache, double, torch.float16, torch.device("cpu")]
    assert all(a is b for a, b in zip(map_tensors(double, tree), tree, strict=True))
    assert not list(leaves(tree))


def test_an_object_that_cannot_be_copied_is_shared() -> None:
    class Locked:
        def __init__(self) -> None:
            self.lock, self.x = threading.Lock(), t()

        def __copy__(self) -> Locked:
            raise TypeError("cannot be copied")

    locked = Locked()
    assert map_tensors(double, [locked])[0] is locked


def test_dataclasses_with_slots_are_rebuilt() -> None:
    @dataclass(slots=True)
    class Slotted:
        a: torch.Tensor
        b: int = 3

    made = map_tensors(double, Slotted(t()))
    assert (float(made.a), made.b) == (2.0, 3)


def test_sets_are_copied_and_keep_their_members() -> None:
    members = {1, 2}
    made = map_tensors(double, [members])[0]
    assert made == {1, 2}
    assert made is not members
