"""An importance from what layers read: the channels that the layers behind them can do without go first.

A weight says little about its channel where another one tells nearly the same. Here channels go one by one; what each
takes along is what its readers lose *after* their other weights were solved for anew, as `reconstruction` will do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ajpq.errors import AjpqError
from ajpq.goals import samples_of
from ajpq.importance import Errors, gains, magnitude
from ajpq.loaders import Batches
from ajpq.network import LayerSpec, Network, Space
from ajpq.reconstruction import NOISE, RIDGE
from ajpq.tasks import CLASSIFICATION, Task
from ajpq.training import device_of

IMAGES = 200  # that moments are taken of, at most
AT_ONCE = 32  # of so many channels left, one goes before the moments are updated
POOL = 4  # times as many are candidates meanwhile
LARGE, SHRINK = 256, 0.75  # matrices larger than this are made smaller when less than this part of them is left


@torch.no_grad()
def elimination(network: Network, batches: Batches, task: Task = CLASSIFICATION) -> Errors:
    """The error that removing a channel adds at the outputs of all layers that read it, their other weights solved for
    anew, when channels of a space go one after another, the cheapest first:

            |w|^2 / h,    h the element of (X'X + r I)^-1 that belongs to the channel, w its weights as they are by then

    (optimal brain surgeon, Hassibi and Stork 1993; the goal, the next layer's output, is that of ThiNet, Luo et al.
    2017, arXiv 1707.06342). X is what a layer reads in up to 200 images, one column per channel, its rows at as many
    positions as `reconstruct` takes, and r the same ridge. The taps of a kernel, and the pixels of a flattened picture,
    are taken to be problems of their own with the same X: an approximation, which keeps the matrices small. Outputs are
    those behind the batch-norm, and every layer's error counts relative to the energy of its outputs. A kernel gets the
    score of the channel that it writes, never less than that of one that went before it.

    Depthwise layers pass channels on and read none here. What no other layer reads, and what cannot be pruned, has its
    `magnitude`. No labels are needed. Raises AjpqError where there is no image.
    """
    problems = _problems(network, batches)
    scores = np.full(network.n_channels, np.nan)
    for space in network.spaces:
        if space.prunable:
            readers = [reader for reader in problems if np.isin(reader.owners, space.channels).any()]
            scores[space.channels] = _one_by_one(space, readers)
    found = Errors(magnitude(network))
    for layer in network.layers:
        of_kernels = scores[layer.writes]
        known = np.isfinite(of_kernels)
        if known.any():
            others = found[layer.name] * of_kernels[known].mean() / max(found[layer.name].mean(), 1e-300)
            found[layer.name] = np.where(known, of_kernels, others)
    return found


class _Reader:
    """One group of a layer: least squares for its weights on the channels that are left.

    inverse: (n, n), of the moments of its n inputs with the ridge. products: (n, n), W W' of its weights W, which have
    a column per kernel and tap. owners: int64 (n,), the channel of every input; one may be read twice."""

    def __init__(self, inverse: Tensor, products: Tensor, owners: np.ndarray) -> None:
        self.inverse, self.products, self.owners = inverse, products, owners

    def of(self, channels: np.ndarray) -> _Blocks:
        """What is to be decided about these channels."""
        found = [np.flatnonzero(self.owners == channel) for channel in channels]
        return _Blocks(self.inverse.clone(), self.products.clone(), [torch.from_numpy(at) for at in found])


class _Blocks:
    """A reader while channels go, one after another. columns: int64 (m,) of every channel, its inputs; m may be 0."""

    def __init__(self, inverse: Tensor, products: Tensor, columns: list[Tensor]) -> None:
        self._hold(inverse, products, columns)

    def _hold(self, inverse: Tensor, products: Tensor, columns: list[Tensor]) -> None:
        self.inverse, self.products, self.columns = inverse, products, columns
        self.stay = torch.ones(len(inverse), dtype=torch.bool)
        self.plan = []  # of channels with as many inputs: their places, and their inputs (c, m)
        for m in sorted({len(at) for at in columns} - {0}):
            which = [i for i, at in enumerate(columns) if len(at) == m]
            self.plan.append((which, torch.stack([columns[i] for i in which])))

    def among(self, pool: list[int]) -> _Blocks:
        """What decides among these channels alone."""
        columns = [self.columns[i] for i in pool]
        at = torch.cat(columns)
        places = torch.arange(len(at)).split([len(c) for c in columns])
        return _Blocks(self.inverse[at][:, at], self.products[at][:, at], list(places))

    def errors(self) -> np.ndarray:
        """What going adds, for every channel: float64 (c,), 0 where it is not read, nothing of meaning where it has
        gone."""
        found = np.zeros(len(self.columns))
        for which, at in self.plan:
            inverse, products = (matrix[at[:, :, None], at[:, None]] for matrix in (self.inverse, self.products))
            ratios = products / inverse if at.shape[1] == 1 else torch.linalg.solve(inverse, products)
            found[which] = ratios.diagonal(dim1=1, dim2=2).sum(1).cpu().numpy()
        return found

    def drop(self, channels: list[int]) -> None:
        """Solve the weights of the others anew: W - share W_out."""
        out = torch.cat([self.columns[i] for i in channels])
        if not len(out):
            return
        across, between = self.inverse[:, out], self.products[out][:, out]
        share = torch.linalg.solve(across[out], across, left=False)  # (n, out)
        half = self.products[:, out] - share @ (between / 2)
        self.products.addmm_(share, half.mT, alpha=-1).addmm_(half, share.mT, alpha=-1)
        self.inverse.addmm_(share, across.mT, alpha=-1)
        self.stay[out] = False
        if len(self.stay) > LARGE and self.stay.sum() < SHRINK * len(self.stay):
            self._shrink()
        else:
            for matrix in (self.products, self.inverse):
                matrix[out], matrix[:, out] = 0, 0
            self.inverse[out, out] = 1

    def _shrink(self) -> None:
        at, places = torch.where(self.stay)[0], self.stay.cumsum(0) - 1
        columns = [places[c[self.stay[c]]] for c in self.columns]
        self._hold(self.inverse[at][:, at], self.products[at][:, at], columns)


def _one_by_one(space: Space, readers: list[_Reader]) -> np.ndarray:
    """What every channel of a space adds when its turn has come, float64 (size,); NaN if nobody reads them."""
    blocks, scores, most = [reader.of(space.channels) for reader in readers], np.full(space.size, np.nan), 0.0
    while blocks and (left := np.flatnonzero(np.isnan(scores))).size:
        going = _cheapest(blocks, left, max(1, len(left) // AT_ONCE))
        for channel, error in going:
            scores[channel] = most = max(most * (1 + 1e-12), error)
        for reader in blocks:
            reader.drop([channel for channel, _ in going])
    return scores


def _cheapest(readers: list[_Blocks], left: np.ndarray, n: int) -> list[tuple[int, float]]:
    """n of the channels that are left, and what each adds once those before it have gone. They are chosen out of a
    pool, among which nothing is neglected."""
    errors = sum(reader.errors() for reader in readers)[left]
    pool = left[np.argsort(errors, kind="stable")[: POOL * n]].tolist()
    if n == 1:
        return [(pool[0], float(errors.min()))]
    near, found = [reader.among(pool) for reader in readers], []
    for _ in range(n):
        errors = sum(reader.errors() for reader in near)
        errors[[pool.index(channel) for channel, _ in found]] = np.inf
        first = int(np.argmin(errors))
        found.append((pool[first], float(errors[first])))
        for reader in near:
            reader.drop([first])
    return found


def _problems(network: Network, batches: Batches) -> list[_Reader]:
    """Every group of every layer that mixes channels, before anything is gone."""
    factors, follows = gains(network), {norm.folds_into for norm in network.norms}
    found = []
    for name, moments in _moments(network, batches).items():
        layer, module = network[name], network.module.get_submodule(name)
        columns = _columns(layer)  # (G, n)
        groups, n = columns.shape
        weight = module.weight.detach().double().reshape(groups, layer.c_out // groups, n, -1)  # (G, K, n, taps)
        if name in factors:
            weight = weight * torch.from_numpy(factors[name]).to(weight).reshape(groups, -1, 1, 1)
        weight = weight.transpose(1, 2).flatten(2)  # (G, n, K taps)
        xx = moments.of(centred=module.bias is not None or name in follows)  # (G, n, n)
        energy = (weight * (xx @ weight)).sum()
        pull = (RIDGE + NOISE) * xx.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny  # (G,)
        inverse, failed = torch.linalg.inv_ex(xx + pull[:, None, None] * torch.eye(n).to(xx))
        if failed.any() or not inverse.isfinite().all() or not energy > 0:
            continue
        products = weight @ weight.mT / energy
        found += [_Reader(inverse[g], products[g], columns[g]) for g in range(groups)]
    return found


def _columns(layer: LayerSpec) -> np.ndarray:
    """The channels behind the inputs of every group, int64 (G, n); of a flattened picture each once, not per pixel."""
    reads = layer.reads.reshape(layer.groups, -1)
    pixels = np.diff(np.flatnonzero(np.diff(layer.reads, prepend=-1, append=-1)))  # lengths of the runs of one channel
    if layer.kind == "linear" and (pixels == pixels[0]).all():
        reads = reads[:, :: pixels[0]]
    return reads


class _Moments:
    """Sums over what one layer reads: of x, (G, n), and of x x', (G, n, n), about a point near the mean."""

    def __init__(self) -> None:
        self.count, self.shift, self.sum, self.squares = 0, None, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """x: (G, N, n)."""
        if self.shift is None:
            self.shift = x.mean(1, keepdim=True)
        x = x - self.shift
        self.sum, self.squares = self.sum + x.sum(1).double(), self.squares + (x.mT @ x).double()
        self.count += x.shape[1]

    def of(self, centred: bool) -> Tensor:
        """Covariances, or moments about 0."""
        mean = self.sum / self.count
        found = self.squares / self.count - mean[:, :, None] * mean[:, None]
        if centred:
            return found
        mean = mean + self.shift[:, 0].double()
        return found + mean[:, :, None] * mean[:, None]


def _moments(network: Network, batches: Batches) -> dict[str, _Moments]:
    """Of every layer that is to be solved."""
    device, images, left = device_of(network.module), [], IMAGES
    for x, *_ in batches:
        images.append(x[:left])
        left -= len(images[-1])
        if left <= 0:
            break
    if left == IMAGES:
        raise AjpqError("this importance needs at least one image, but the calibration gave 0; pass training images")
    layers = [layer for layer in network.layers if layer.kind != "depthwise"]
    found = {layer.name: _Moments() for layer in layers}
    random = torch.Generator().manual_seed(0)

    def hook(layer: LayerSpec):
        groups, n = _columns(layer).shape
        samples, pixels = -(-samples_of(n) // (IMAGES - left)), layer.c_in // (groups * n)

        def keep(module: nn.Module, args: Any, y: Tensor) -> None:
            x = args[0] if layer.kind == "linear" else args[0].flatten(2).mT  # (N, ..., c_in)
            x = x.reshape(len(x), -1, groups, n, pixels).movedim(4, 2).flatten(1, 2)  # (N, positions, G, n)
            at = torch.randperm(x.shape[1], generator=random)[:samples].sort().values
            found[layer.name].add(x[:, at.to(x.device)].flatten(0, 1).transpose(0, 1))

        return keep

    handles = [network.module.get_submodule(layer.name).register_forward_hook(hook(layer)) for layer in layers]
    try:
        for x in images:
            network.module(x.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found
