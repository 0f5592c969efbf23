"""How a fresh loader goes on where another one was."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from ajpq.data import digits
from ajpq.epochs import begun, go_on, orders_of, reseed, restarted, seeded
from ajpq.errors import AjpqError
from ajpq.loaders import Beside

IMAGES, LABELS = torch.arange(60.0).view(20, 3, 1, 1), torch.arange(20)


class Noisy(Dataset):
    """Images that are augmented with random numbers of the data set's own."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(4)

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int):
        return IMAGES[index] + torch.rand(3, 1, 1, generator=self.random), LABELS[index]


class Hidden:
    """Batches whose order cannot be seen from outside."""

    def __init__(self) -> None:
        inner = digits(batch_size=200).train
        self._begin = lambda: iter(inner)

    def __iter__(self):
        return self._begin()


class Counted(Hidden):
    """Of known length."""

    def __init__(self, batch_size: int) -> None:
        inner = digits(seed=1, batch_size=batch_size).train
        self._begin, self._length = lambda: iter(inner), len(inner)

    def __len__(self) -> int:
        return self._length


def own(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_batch_sampler() -> DataLoader:
    random = RandomSampler(LABELS, generator=own())
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_sampler=BatchSampler(random, 4, drop_last=False))


LOADERS = {
    "ImageBatches": (lambda: digits(batch_size=200).train, 1),
    "list": (lambda: [(IMAGES, LABELS)] * 2, 0),
    "hidden": (Hidden, 0),
    "torch": (lambda: DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=True, generator=own()), 1),
    "batch_sampler": (by_batch_sampler, 1),
    "augmented": (lambda: DataLoader(Subset(Noisy(), range(10)), 4, shuffle=True, generator=own()), 2),
    "beside": (lambda: Beside(digits(batch_size=200).train, digits(seed=1, batch_size=300).train), 2),
    "hidden beside seen": (lambda: Beside(Hidden(), digits(seed=1, batch_size=300).train), 1),
    "seen beside hidden": (lambda: Beside(digits(batch_size=200).train, Counted(500)), 1),
    "hidden beside hidden": (lambda: Beside(Counted(200), Counted(500)), 0),
    "joined": (lambda: DataLoader(ConcatDataset([Noisy(), Noisy()]), 8), 2),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_fresh_loader_goes_on_where_another_one_was(name: str) -> None:
    make, generators = LOADERS[name]
    batches = make()
    first, _ = list(batches), list(batches)
    orders = orders_of(batches)
    expected = list(batches)
    assert len(orders) == generators
    assert name == "list" or not torch.equal(expected[0][0], first[0][0])
    again = make()
    go_on(again, orders, 2)
    found = list(again)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_a_dataloader_without_a_generator_leaves_torchs_own_alone() -> None:
    batches, state = DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=True), torch.get_rng_state()
    go_on(batches, orders_of(batches), 3)
    assert orders_of(batches) == [] and torch.equal(torch.get_rng_state(), state)


def test_a_loader_with_other_generators_is_refused() -> None:
    batches = LOADERS["torch"][0]()
    with pytest.raises(AjpqError, match="0 generators and its batches have 1"):
        go_on(batches, [], 0)
    with pytest.raises(AjpqError, match="1 generators and its batches have 0"):
        go_on([], orders_of(batches), 0)


def test_an_epoch_that_is_abandoned_does_not_change_the_next() -> None:
    whole, broken = seeded(7), seeded(7)
    torch.rand(100, generator=begun(whole)), torch.rand(1, generator=begun(broken))
    assert torch.equal(torch.rand(5, generator=begun(whole)), torch.rand(5, generator=begun(broken)))
    assert torch.equal(torch.rand(5, generator=begun(restarted(whole))), torch.rand(5, generator=begun(seeded(7))))
    assert seeded(None) is None and restarted(None) is None


@pytest.mark.parametrize("loader", (lambda: digits(batch_size=200).train, lambda: digits(batch_size=200, seed=1).train))
def test_every_seed_has_orders_of_its_own(loader):
    """Those of 1000 are not those of 0, nor are those of 1 those of 0 an epoch later."""

    def orders(seed: int) -> list[tuple[int, ...]]:
        batches = loader()
        reseed(batches, seed)
        return [tuple(torch.cat([y for _, y in batches]).tolist()) for _ in range(3)]

    found = {seed: orders(seed) for seed in (0, 1, 2, 1000, 2000)}
    assert len({order for some in found.values() for order in some}) == 15
    assert orders(1000) == found[1000]
