"""How a picture with boxes is seen: resized, and in training mirrored, moved, zoomed and in another light."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from ajpq.errors import AjpqError

KEPT = 2.5  # times the size of what is seen: larger pictures are kept smaller
STRETCH = 0.2  # of a zoom: how far width and height differ in it
GREY = 127  # where a view reaches beyond the picture
MODES = {
    "nearest": (Image.NEAREST, InterpolationMode.NEAREST_EXACT),  # the same pixels, but for ties
    "bilinear": (Image.BILINEAR, InterpolationMode.BILINEAR),
    "bicubic": (Image.BICUBIC, InterpolationMode.BICUBIC),
}


@dataclass(frozen=True)
class View:
    """What is seen of a picture. x, y: how far it is moved, as fractions of what is seen. across, down: fractions of
    its width and height that are seen. light: factor on the pixels."""

    mirrored: bool = False
    x: float = 0.0
    y: float = 0.0
    across: float = 1.0
    down: float = 1.0
    light: float = 1.0

    def pixels(self, image: Tensor, size: tuple[int, int], resize: str) -> Tensor:
        """uint8 (3, H, W) -> (3, *size)."""
        h, w = image.shape[1:]
        high, wide = max(1, round(self.down * h)), max(1, round(self.across * w))
        top, left = round(h * (0.5 - (0.5 + self.y) * self.down)), round(w * (0.5 - (0.5 + self.x) * self.across))
        image = functional.horizontal_flip(image) if self.mirrored else image
        image = functional.adjust_brightness(image, self.light) if self.light != 1 else image
        beyond = [max(0, -left), max(0, -top), max(0, left + wide - w), max(0, top + high - h)]
        image = functional.pad(image, beyond, fill=GREY)
        image = functional.crop(image, top + beyond[1], left + beyond[0], high, wide)
        return functional.resize(image, list(size), MODES[resize][1], antialias=True)

    def boxes(self, boxes: Tensor) -> Tensor:
        """Corners (M, 4) as fractions of the picture -> of what is seen of it, to half a pixel. What is beyond is cut
        off; a box that loses more than half is dropped: -1, like unused rows."""
        x1, y1, x2, y2 = boxes.unbind(-1)
        if self.mirrored:
            x1, x2 = 1 - x2, 1 - x1
        x1, x2 = ((x - 0.5) / self.across + 0.5 + self.x for x in (x1, x2))
        y1, y2 = ((y - 0.5) / self.down + 0.5 + self.y for y in (y1, y2))
        whole = torch.stack([x1, y1, x2, y2], dim=-1)
        cut = whole.clamp(0, 1)
        area, left = ((b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (whole, cut))
        kept = (boxes[..., 2] > boxes[..., 0]) & (left > area / 2)
        return torch.where(kept[..., None], cut, torch.full((), -1.0))


@dataclass(frozen=True)
class Views:
    """What augmentation may do. move: fraction of what is seen, at most, in both directions. zoom: what is seen is
    exp(-zoom) to exp(zoom) of the picture's width and height. light: by which fraction pixels change, at most."""

    move: float = 0.1
    zoom: float = 0.0
    light: float = 0.2

    def __post_init__(self) -> None:
        """Raises AjpqError."""
        if isinstance(self.zoom, bool) or not isinstance(self.zoom, int | float) or not 0 <= self.zoom <= 1:
            raise AjpqError(f"zoom must be a number from 0 to 1, but it is {self.zoom!r}; write zoom=0.25")

    def draw(self, generator: torch.Generator) -> View:
        """Mirrored with probability 1/2."""
        side, *numbers = torch.rand(6, generator=generator, dtype=torch.float64).tolist()
        x, y, zoom, stretch, light = (2 * number - 1 for number in numbers)
        across, down = (math.exp(self.zoom * (zoom + way * STRETCH * stretch)) for way in (-1, 1))
        return View(side < 0.5, x * self.move, y * self.move, across, down, 1 + light * self.light)


def kept(picture: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """A picture as it is, or, where both its sides are more than `KEPT` times those of what is seen, made smaller."""
    factor = KEPT * max(size[0] / picture.height, size[1] / picture.width)
    if factor >= 1:
        return picture
    return picture.resize((round(picture.width * factor), round(picture.height * factor)), MODES[resize][0])
