"""What is kept of earlier candidates: never more than allowed, and what is worth most for its bytes."""

import numpy as np
import torch

from ajpq.scoring.shelf import Shelf


def tensor(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


def test_while_there_is_room_everything_is_kept():
    shelf = Shelf(100)
    values = {name: tensor(25) for name in "abcd"}
    for name, value in values.items():
        shelf.offer(name, value, 1.0, name)
    assert shelf.held == 100 and all(shelf.take([name])[0] is value for name, value in values.items())
    assert [v is values[n] for v, n in zip(shelf.take(["a", "d"]), "ad", strict=True)] == [True, True]
    assert shelf.take(["a", "x"]) is None and shelf.holds(["a"]) and not shelf.holds(["a", "x"])
    shelf.offer("e", tensor(0), 1.0, "e")
    assert shelf.holds(["e"])  # costs nothing


def test_a_full_shelf_lets_in_what_is_worth_more_than_twice_as_much():
    shelf = Shelf(100)
    shelf.offer("cheap", tensor(50), 1.0, "cheap"), shelf.offer("dear", tensor(50), 100.0, "dear")
    shelf.offer("equal", tensor(50), 1.9, "equal")
    assert not shelf.holds(["equal"]) and shelf.holds(["cheap", "dear"])
    shelf.offer("better", tensor(50), 2.1, "better")
    assert shelf.holds(["better", "dear"]) and not shelf.holds(["cheap"]) and shelf.held == 100


def test_what_candidates_had_again_stays_and_is_let_in():
    shelf = Shelf(100)
    shelf.offer("parent", tensor(50), 1.0, "parent"), shelf.offer("idle", tensor(50), 1.0, "idle")
    for name in (["parent", "idle"], ["parent"], ["parent"]):
        shelf.remember(name)
    for i in range(20):  # a stream of strangers, worth three times as much, never displaces both
        shelf.offer(f"n{i}", tensor(50), 3.0, f"n{i}")
        shelf.remember([f"n{i}"])
    assert shelf.holds(["parent"]) and not shelf.holds(["idle"])
    shelf.remember(["child", "child2"])
    for _ in range(6):
        shelf.remember(["child"])
    shelf.offer("child2", tensor(50), 1.0, "child2")
    assert not shelf.holds(["child2"])
    shelf.offer("child", tensor(50), 3.0, "child")
    assert shelf.holds(["child", "parent"])


def test_counts_fade():
    shelf = Shelf(50)
    shelf.offer("old", tensor(50), 1.0, "old")
    for _ in range(10):
        shelf.remember(["old"])
    new = [f"n{i}" for i in range(40 * 32)]
    for name in new:
        shelf.remember([name])
    shelf.offer("new", tensor(50), 1.0, "new")
    assert shelf.holds(["new"]) and shelf._unit < 2.0**501


def test_a_value_larger_than_the_shelf_or_than_all_that_is_worth_less_is_refused():
    shelf = Shelf(100)
    shelf.offer("big", tensor(101), 1e9, "big")
    assert shelf.held == 0
    shelf.offer("a", tensor(50), 1.0, "a"), shelf.offer("b", tensor(50), 1000.0, "b")
    shelf.offer("wide", tensor(100), 200.0, "wide")  # would have to push out b, which is worth ten times as much a byte
    assert shelf.holds(["a", "b"]) and not shelf.holds(["wide"])
    shelf.offer("c", tensor(50), 2.1, "c")
    assert shelf.holds(["b", "c"])  # the refusal of `wide` left the order as it was


def test_a_lower_limit_takes_effect_at_once():
    shelf = Shelf(100)
    for i in range(4):
        shelf.offer(i, tensor(25), float(i), i)
    shelf.limit(60)
    assert shelf.held == 50 and shelf.holds([2, 3]) and not shelf.holds([0])
    shelf.limit(-5)
    assert shelf.held == shelf.capacity == 0


def test_a_part_of_a_larger_tensor_counts_as_what_it_keeps_alive():
    shelf = Shelf(100)
    shelf.offer("part", tensor(200)[:10], 1.0, "part")
    assert shelf.held == 0


def test_never_more_than_the_capacity():
    random, shelf = np.random.default_rng(0), Shelf(1000)
    for i in range(2000):
        name = f"n{random.integers(100)}"
        shelf.offer(name, tensor(int(random.integers(0, 400))), float(random.random()), name)
        shelf.remember([name])
        shelf.take([f"n{random.integers(100)}"])
        held = sum(entry.size for entry in shelf._entries.values())
        assert shelf.held == held <= 1000, i
    shelf.clear()
    assert shelf.held == 0 and not shelf.holds(["n1"])
    empty = Shelf(0)
    empty.offer("a", tensor(1), 1.0, "a")
    assert empty.held == 0
