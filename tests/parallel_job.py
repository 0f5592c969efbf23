"""What every process of test_parallel.py runs: `torchrun ... parallel_job.py FOLDER`. Each writes what it found to
FOLDER/<rank>.pt."""

import sys
from pathlib import Path

import torch
from nets import batches_of, network_of, random_policy
from torch import nn
from torch.utils.data import DataLoader

from ajpq import parallel
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.data import digits
from ajpq.errors import AjpqError
from ajpq.finetuning import finetune
from ajpq.training import fit


class Watched:
    """A loader that notes which images it gave, epoch by epoch."""

    def __init__(self, loader):
        self.loader, self.seen = loader, []

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        self.seen.append([])
        for x, y in self.loader:
            self.seen[-1] += y.tolist()
            yield x, y % 4


def plain(folder):
    """A network without batch-norm on shuffled and shifted digits, with all that a step can have."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    net.idle = nn.Parameter(torch.ones(2, 2))  # gets no gradient, and must not decay
    rows = fit(net, digits().train, epochs=2, lr=0.05, clip_grad=0.5, ema=0.9, accumulate=3)
    return {"rows": rows, "state": net.state_dict()}


def compressed(folder):
    """A student with batch-norms and widths that come down; the processes begin with weights of their own."""
    network = network_of("digits_cnn")
    batches = batches_of(network, count=4, size=7)
    student = compress(network, random_policy(network, 0, act_bits=(4, 8)), calibrate(network, batches))
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + 0.001 * (not parallel.is_main()))
    seen = []
    options = {"lr": 0.02, "lowering": 0.5, "ema": 0.9, "checkpoint": folder / "state.pt"}
    finetune(student, batches, epochs=3, on_epoch=lambda epoch, _: seen.append(epoch), **options)
    before = (folder / "state.pt").stat().st_mtime_ns
    again = fit_again(network, batches, options)
    return {
        "state": student.state_dict(), "epochs": seen, "again": again,
        "rewritten": (folder / "state.pt").stat().st_mtime_ns != before,
    }  # fmt: skip


def fit_again(network, batches, options):
    """The same training, of which the checkpoint has all."""
    student = compress(network, random_policy(network, 0, act_bits=(4, 8)), calibrate(network, batches))
    finetune(student, batches, epochs=3, **options)
    return student.state_dict()


def shuffled(folder):
    """Batches of five, dropout, and an order that the loader draws from torch's own generator."""
    torch.manual_seed(7)
    data = [(torch.randn(3), torch.tensor(i)) for i in range(15)]
    loader = Watched(DataLoader(data, batch_size=5, shuffle=True))
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    fit(net, loader, epochs=3, lr=0.1)
    return {"seen": loader.seen, "state": net.state_dict()}


def spoiled(folder):
    """An image of the second process is not a number; it gets into the running statistics."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 6, 3), torch.randint(4, (4, 6))
    x[1, 5, 0] = torch.nan
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    rows = fit(net, list(zip(x, y, strict=True)), epochs=1, lr=0.1)
    return {"rows": rows, "state": net.state_dict()}


def too_small(folder):
    try:
        fit(nn.Linear(3, 4), [(torch.randn(1, 3), torch.zeros(1, dtype=torch.long))], epochs=1, lr=0.1)
    except AjpqError as error:
        return str(error)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    parallel.join()
    found = {job.__name__: job(place) for job in (plain, compressed, shuffled, spoiled, too_small)}
    torch.save(found, place / f"{torch.distributed.get_rank()}.pt")
    parallel.leave()
