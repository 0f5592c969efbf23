"""What does solving for the weights bring before any training? Test accuracy of ResNet-20 on CIFAR-10.

    python benchmarks/reconstruct.py --root DIR --checkpoint FILE --seeds 3

Policies: 2, 3 and 4 bits everywhere, and 8 bits with a part of the channels of every prunable space gone, those of
least importance. Contestants, on the same images, drawn anew for every seed:

    norms        batch-norms matched to the original's (`correction=least_squares`)
    weights      weights solved for as well, then rounded to the nearest
    compensated  rounding that compensates as well (`ajpq.reconstruct`)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from unittest import mock

import torch
from torch import Tensor

import ajpq
from ajpq import models, quantize, reconstruction
from ajpq.calibration import calibrate
from ajpq.compression import compress
from ajpq.data import cifar10
from ajpq.loaders import take
from ajpq.matching import match
from ajpq.space import Choices, SearchSpace
from ajpq.tracing import trace


def nearest(weight: Tensor, gram: Tensor, bits: Tensor, scale: Tensor) -> Tensor:
    flat = weight.reshape(-1, weight.shape[-1]).float()
    return quantize.fake_quantize(flat, bits, scale).reshape(weight.shape).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="of CIFAR-10, as data.root")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of ResNet-20")
    parser.add_argument("--images", type=int, nargs="+", default=[400])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = models.resnet20().eval()
    ajpq.load_weights(model, args.checkpoint)
    splits = [cifar10(args.root, seed=seed, calibration_images=max(args.images)) for seed in range(args.seeds)]
    test = splits[0].test
    network = trace(model, next(iter(test))[0][:2])
    space = SearchSpace(network, Choices())
    policies = {f"{bits} bits": space.homogeneous(bits, 0.0, 8) for bits in (2, 3, 4)}
    policies |= {f"8 bits, {part:.0%} of the channels gone": space.homogeneous(8, part, 8) for part in (0.2, 0.4)}
    print(f"original {ajpq.accuracy(model, test):.4f}")
    for images in args.images:
        for name, policy in policies.items():
            found: dict[str, list[float]] = {"norms": [], "weights": [], "compensated": []}
            for data in splits:
                batches = list(take(data.calibration, images))
                ranges = calibrate(network, batches)
                for how, scores in found.items():
                    student = compress(network, policy, ranges)
                    if how == "norms":
                        match(student, network, policy, batches)
                    elif how == "compensated":
                        reconstruction.reconstruct(student, network, policy, batches)
                    else:
                        with mock.patch.object(reconstruction, "round_compensated", nearest):
                            reconstruction.reconstruct(student, network, policy, batches)
                    scores.append(ajpq.accuracy(student, test))
            told = [f"{how} {mean(s):.4f} ({min(s):.4f} to {max(s):.4f})" for how, s in found.items()]
            print(f"{images} images, {name}: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
