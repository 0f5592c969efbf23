"""What can be searched in every classifier of torchvision and in the backbones and heads of two of its detectors: the
tables of docs/networks.md.

    python benchmarks/networks.py                         # all but the two of more than 600 million parameters
    python benchmarks/networks.py resnet18 convnext_tiny  # these

Only traces, with random weights on two small images: some minutes on one core. Every kernel of every row can have its
own width; the question is which can be removed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection

from ajpq.errors import AjpqError
from ajpq.models import torchvision_model
from ajpq.network import Network
from ajpq.tracing import trace

SIZES = {"alexnet": 63, "inception_v3": 75}  # the smallest pictures they take; 32 for the others
TOO_LARGE = ("regnet_y_128gf", "vit_h_14")
TRANSFORMERS = {
    "vit": (32, {"image_size": 32}),
    "swin": (32, {}),
    "maxvit": (224, {}),
}


class Detector(nn.Module):
    """What of a torchvision detector is a network: backbone and head, without anchors, matching and suppression."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(x).values()))


def classifier(name: str) -> tuple[nn.Module, int]:
    """The network with ten classes, and the size of its pictures."""
    size, settings = TRANSFORMERS.get(name.split("_")[0], (SIZES.get(name, 32), {}))
    return torchvision_model(name, classes=10, **settings), size


def detectors() -> dict[str, tuple[nn.Module, int]]:
    options = {"weights": None, "weights_backbone": None}
    retina = detection.retinanet_resnet50_fpn(**options).eval()
    lite = detection.ssdlite320_mobilenet_v3_large(**options).eval()
    return {
        "retinanet_resnet50_fpn: `backbone.body`": (retina.backbone.body, 64),
        "retinanet_resnet50_fpn: `backbone`": (retina.backbone, 64),
        "retinanet_resnet50_fpn: backbone and head": (Detector(retina), 64),
        "ssdlite320_mobilenet_v3_large: `backbone`": (lite.backbone, 320),
        "ssdlite320_mobilenet_v3_large: backbone and head": (Detector(lite), 320),
    }


def reasons(network: Network) -> Iterable[str]:
    """Why channels that a layer writes cannot be pruned, with their number, most first."""
    found: dict[str, int] = {}
    for space in network.spaces:
        if space.writers and not space.prunable:
            found[space.why_not] = found.get(space.why_not, 0) + space.size
    short = " is not known to keep channels apart"
    return (f"{n:,} {why.removesuffix(short)}" for why, n in sorted(found.items(), key=lambda pair: -pair[1]))


def row(name: str, model: nn.Module, size: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    try:
        network = trace(model.eval(), torch.randn(2, 3, size, size))
    except AjpqError as error:
        return f"| {name} | {parameters / 1e6:.1f} | | | | {error} |"
    spaces = [space for space in network.spaces if space.writers]
    kernels = sum(layer.c_out for layer in network.layers)
    free = sum(int(network.prunable[layer.writes].sum()) for layer in network.layers)
    listed = list(reasons(network))
    more = f"; {len(listed) - 3} more reasons" if len(listed) > 3 else ""
    return (
        f"| {name} | {parameters / 1e6:.1f} | {sum(s.prunable for s in spaces)}/{len(spaces)} | {free / kernels:.3f} | "
        f"{network.weights / parameters:.3f} | {'; '.join(listed[:3])}{more} |"
    )


def main() -> None:
    torch.manual_seed(0)
    print("| network | million parameters | spaces | kernels | weights | frozen channels |")
    print("|---|---|---|---|---|---|")
    names = sys.argv[1:] or [name for name in models.list_models(module=models) if name not in TOO_LARGE]
    for name in names:
        print(row(name, *classifier(name)), flush=True)
    for name, (model, size) in () if sys.argv[1:] else detectors().items():
        print(row(name, model, size), flush=True)


if __name__ == "__main__":
    main()
