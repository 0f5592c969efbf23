"""Images of any mode as three colours. Alone here, as torchvision, which all else that reads pictures needs, takes
seconds to import."""

from __future__ import annotations

import numpy as np
from PIL import Image


def rgb(image: Image.Image) -> Image.Image:
    """Any picture in 8 bits per colour. Grey ones of 16 bits, which Pillow would clip, keep their upper 8."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
