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


def test_a_full_shelf_lets_in_only_what_was_computed_before_and_is_worth_more():
    shelf = Shelf(100)
    shelf.offer("cheap", tensor(50), 1.0, "cheap")
    shelf.offer("dear", tensor(50), 100.0, "dear")
    shelf.offer("new", tensor(50), 10.0, "new")
    assert not shelf.holds(["new"])  # seen for the first time
    shelf.remember(["new", "poor"])
    shelf.offer("poor", tensor(50), 0.5, "poor")
    assert not shelf.holds(["poor"]) and shelf.holds(["cheap", "dear"])  # worth less than both
    shelf.offer("new", tensor(50), 10.0, "new")
    assert shelf.holds(["new", "dear"]) and not shelf.holds(["cheap"]) and shelf.held == 100


def test_a_value_larger_than_the_shelf_or_than_all_that_is_worth_less_is_refused():
    shelf = Shelf(100)
    shelf.remember(["big", "wide"])
    shelf.offer("big", tensor(101), 1e9, "big")
    assert shelf.held == 0
    shelf.offer("a", tensor(50), 1.0, "a"), shelf.offer("b", tensor(50), 1000.0, "b")
    shelf.offer("wide", tensor(100), 200.0, "wide")  # would have to push out b, which is worth ten times as much a byte
    assert shelf.holds(["a", "b"]) and not shelf.holds(["wide"])
    shelf.offer("c", tensor(50), 2.0, "c")
    assert not shelf.holds(["c"])
    shelf.remember(["c"])
    shelf.offer("c", tensor(50), 2.0, "c")
    assert shelf.holds(["b", "c"])  # the refusal of `wide` left the order as it was


def test_use_counts_and_time_passes():
    shelf = Shelf(100)
    shelf.offer("used", tensor(50), 1.0, "used"), shelf.offer("idle", tensor(50), 1.5, "idle")
    shelf.take(["used"])
    shelf.remember(["next"])
    shelf.offer("next", tensor(50), 1.6, "next")
    assert shelf.holds(["used", "next"]) and not shelf.holds(["idle"])
    names = [f"n{i}" for i in range(50)]
    shelf.remember(names)
    for name in names:  # none is worth as much as `used` was, but it is not used any more
        shelf.offer(name, tensor(50), 1.9, name)
    assert not shelf.holds(["used"])


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
