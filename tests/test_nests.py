"""Nests of any kind are rebuilt, and the originals stay as they are."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
import torch

from lightning_dgmp.nests import join, leaves, map_leaves, replace_leaves, split, values_in
from tests.models import Graph


class Batch(MutableMapping[str, Any]):
    """A user's own mapping, which keeps its items in a dict."""

    def __init__(self, items: Any) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Checked(namedtuple("_Checked", "content")):
    """A user's own named tuple, which cannot be made of anything but tensors, as a `PackedSequence`."""

    def __new__(cls, content: dict[str, Any]) -> Checked:
        assert content["x"].sum() is not None
        return super().__new__(cls, content)


KINDS = [
    dict,
    OrderedDict,
    UserDict,
    lambda **items: Batch(items),
    lambda **items: [items],
    lambda **items: deque([items], 3),
    lambda **items: Checked(items),
]


@pytest.mark.parametrize("make", KINDS)
def test_a_nest_is_rebuilt(make: Any) -> None:
    x, y = torch.zeros(3), torch.ones(2)
    nest = make(x=x, inner={"y": y}, name="a")
    other = map_leaves(lambda leaf: leaf + 1 if isinstance(leaf, torch.Tensor) else leaf, nest)
    assert type(other) is type(nest)
    assert [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(other)] == [
        [1] * 3,
        [2] * 2,
        "a",
    ]
    assert [id(leaf) for leaf in leaves(nest)] == [id(x), id(y), id("a")]


@pytest.mark.parametrize("make", KINDS)
def test_joining_is_the_opposite_of_splitting(make: Any) -> None:
    nest = make(x=torch.zeros(3), inner={"y": torch.ones(2)}, name="a")
    form, tensors = split(nest)
    assert all(a is b for a, b in zip(leaves(join(form, tensors)), leaves(nest)))
    with pytest.raises(ValueError, match="a tensor for each of its 2 places, but got 1"):
        join(form, tensors[:1])


def test_what_is_not_dense_is_pickled_with_the_form() -> None:
    parts = [torch.ones(3), torch.zeros(2)]
    nest = [torch.nested.nested_tensor(parts), torch.eye(2).to_sparse(), torch.ones(1)]
    form, tensors = split(nest)
    nested, sparse, dense = join(pickle.loads(pickle.dumps(form)), tensors)
    assert all(map(torch.equal, nested.unbind(), parts))
    assert torch.equal(sparse.to_dense(), torch.eye(2))
    assert dense is nest[2]


def test_values_in_objects() -> None:
    """Objects count once, also if they refer to each other, and their large containers are not looked into."""
    x, y, z = torch.zeros(3), torch.ones(2), torch.ones(1)
    words = [str(i) for i in range(1000)]
    graph, other = Graph(x=x, more=[{"y": y}], words=words), Graph(z=z)
    graph.other, other.owner = other, graph
    nest = [graph, {"again": other}, z]
    assert [id(value) for value in values_in(nest) if isinstance(value, torch.Tensor)] == [id(x), id(y), id(z), id(z)]
    assert replace_leaves(lambda leaf: 0 if leaf is y else leaf + 1 if leaf is z else leaf, nest) is nest
    assert (graph.more, other.z, nest[2]) == ([{"y": 0}], 2, 2)
    assert graph.x is x
    assert graph.words is words


def test_modules_and_functions_are_values() -> None:
    values = [torch.nn.Linear(1, 1), Graph, len, lambda: 0, torch.float32, torch]
    assert values_in(values) == values
