"""Detection with one anchor head (YOLOv2, Redmon and Farhadi 2017, arXiv 1612.08242, as SkyNet has it), one class."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, nms

from ajpq.errors import AjpqError
from ajpq.tasks import means

Anchors = Sequence[tuple[float, float]]  # width and height, in cells
SKYNET = ((1.4940052559648322, 2.3598481287086823), (4.0113013115312155, 5.760873975661669))


@dataclass(frozen=True)
class Detection:
    """Boxes of one class: outputs (N, 5 A, H, W) hold tx, ty, tw, th and the confidence's logit of A anchors in every
    cell; targets (N, M, 4) corners x1, y1, x2, y2 as fractions of the image, unused rows all -1.

    Reports "iou": mean over the images of the intersection over union of the single most confident box with the object
    that it fits best, which is the metric of the DAC-SDC contest where there is one object (an image without objects
    counts 1 if that box has a confidence below 1/2, else 0). average_precision: reports "map50" and "map" (IoU 0.5, and
    0.50 to 0.95) as well, computed by pycocotools. ignore: cells without an object are not pressed to confidence 0
    where their box meets an object by more IoU than this. weights: of the squared errors of coordinates, of
    confidences without and with an object.
    """

    anchors: Anchors = SKYNET
    ignore: float = 0.6
    weights: tuple[float, float, float] = (1.0, 1.0, 5.0)
    average_precision: bool = False
    metric: str = field(default="iou", init=False)

    def __post_init__(self) -> None:
        if self.average_precision:
            _coco()

    def decode(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Corners (N, A H W, 4) as fractions, and confidences (N, A H W); cells of one anchor row by row."""
        n, _, h, w = outputs.shape
        x, y, width, height, logit = self._parts(outputs)
        x, width, y, height = x / w, width / w, y / h, height / h
        corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)
        return corners.reshape(n, -1, 4), torch.sigmoid(logit).reshape(n, -1)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The region loss of YOLOv2 without classes: half the weighted sum of squared errors of coordinates (against
        the best anchor of the object's cell) and of confidences (against the IoU where there is an object, else 0)."""
        n, _, h, w = outputs.shape
        raw = outputs.view(n, len(self.anchors), 5, h, w)
        boxes, confidence = self.decode(outputs)
        confidence = confidence.view(n, len(self.anchors), h, w)
        place, goal, valid = self._assigned(targets.to(outputs), h, w)
        with torch.no_grad():
            overlap = torch.stack([_overlaps(found, those) for found, those in zip(boxes, targets, strict=True)])
        best = overlap.amax(2) if overlap.shape[2] else overlap.new_zeros(overlap.shape[:2])
        free = (best.view_as(confidence) <= self.ignore).to(outputs)
        coordinates, found = outputs.new_zeros(n), outputs.new_zeros(n)
        for m in range(targets.shape[1]):  # the last object of a cell and anchor counts once more, as in the original
            a, i, j = place[:, m].unbind(1)
            rows, here = torch.arange(n, device=outputs.device), valid[:, m].to(outputs)
            chosen = raw[rows, a, :, i, j]  # (N, 5)
            told = torch.cat([torch.sigmoid(chosen[:, :2]), chosen[:, 2:4]], dim=1)
            coordinates = coordinates + here * (told - goal[:, m]).square().sum(1)
            iou = overlap[rows, (a * h + i) * w + j, m]
            found = found + here * (confidence[rows, a, i, j] - iou).square()
            free[rows, a, i, j] = free[rows, a, i, j] * (1 - here)
        empty = (free * confidence.square()).sum((1, 2, 3))
        by, without, with_object = self.weights
        return (by * coordinates + without * empty + with_object * found) / 2

    def divergences(self, outputs: Tensor, original: Tensor, temperature: float = 1.0) -> Tensor:
        """Of Kullback and Leibler where a confidence is the probability of an object, and coordinates, which count by
        that probability, are Gaussian with a standard deviation of one cell or a factor of e. Our choice."""
        n, _, h, w = outputs.shape
        ours, theirs = (t.view(n, len(self.anchors), 5, h, w) for t in (outputs, original))
        p, q = theirs[:, :, 4] / temperature, ours[:, :, 4] / temperature
        chance = torch.sigmoid(p)
        confidence = chance * (F.logsigmoid(p) - F.logsigmoid(q)) + (1 - chance) * (F.logsigmoid(-p) - F.logsigmoid(-q))
        at = (torch.sigmoid(ours[:, :, :2]) - torch.sigmoid(theirs[:, :, :2])).square().sum(2)
        size = (ours[:, :, 2:4] - theirs[:, :, 2:4]).square().sum(2)
        return temperature**2 * confidence.sum((1, 2, 3)) + (chance * (at + size) / 2).sum((1, 2, 3))

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        boxes, confidence = self.decode(outputs)
        first = confidence.argmax(1)
        found = []
        for box, sure, those in zip(boxes[torch.arange(len(boxes)), first], confidence.amax(1), targets, strict=True):
            there = those[_is_box(those)].to(box)
            found.append(box_iou(box[None], there).amax() if len(there) else (sure < 0.5).to(box))
        return torch.stack(found)

    def answers(self, outputs: Tensor) -> tuple[str, Tensor]:
        """The surest box."""
        return "surest box", self.decode(outputs)[1].argmax(1)

    def per_image(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"iou": self.quality(outputs, targets).double()}

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        found = means(self.per_image(outputs, targets))
        return found | (average_precision(*self.decode(outputs), targets) if self.average_precision else {})

    def _parts(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Centre, width and height in cells, and the logit, (N, A, H, W) each."""
        n, channels, h, w = outputs.shape
        if channels != 5 * len(self.anchors):
            raise AjpqError(
                f"detection with {len(self.anchors)} anchors needs {5 * len(self.anchors)} output channels, but the "
                f"network has {channels}; set task.anchors to those it was trained with"
            )
        raw = outputs.view(n, len(self.anchors), 5, h, w)
        width, height = torch.as_tensor(self.anchors).to(outputs).T.view(2, 1, -1, 1, 1)
        columns = torch.arange(w, device=outputs.device).to(outputs)
        rows = torch.arange(h, device=outputs.device).to(outputs)[:, None]
        x, y = torch.sigmoid(raw[:, :, 0]) + columns, torch.sigmoid(raw[:, :, 1]) + rows
        return x, y, raw[:, :, 2].exp() * width, raw[:, :, 3].exp() * height, raw[:, :, 4]

    def _assigned(self, targets: Tensor, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Anchor, row and column of every object (N, M, 3), what tx, ty, tw, th should say there (N, M, 4), and whether
        there is one (N, M)."""
        valid = _is_box(targets)
        size = (targets[..., 2:] - targets[..., :2]) * targets.new_tensor([w, h])  # (N, M, 2), cells
        size = torch.where(valid[..., None], size, torch.ones_like(size))
        centre = (targets[..., 2:] + targets[..., :2]) / 2 * targets.new_tensor([w, h])
        centre = torch.where(valid[..., None], centre, torch.zeros_like(centre))
        anchors = torch.as_tensor(self.anchors).to(targets)  # (A, 2)
        both = torch.minimum(size[:, :, None], anchors).prod(-1)
        anchor = (both / (size.prod(-1)[..., None] + anchors.prod(-1) - both)).argmax(-1)  # (N, M)
        cell = centre.floor().clamp(min=0)
        cell = torch.minimum(cell, targets.new_tensor([w - 1, h - 1]))
        goal = torch.cat([centre - cell, (size / anchors[anchor]).log()], dim=-1)
        return torch.stack([anchor, cell[..., 1].long(), cell[..., 0].long()], dim=-1), goal, valid


def _is_box(corners: Tensor) -> Tensor:
    return (corners[..., 2] > corners[..., 0]) & (corners[..., 3] > corners[..., 1])


def _overlaps(boxes: Tensor, targets: Tensor) -> Tensor:
    """IoU of boxes (B, 4) with targets (M, 4), (B, M); 0 with rows that are no box."""
    return box_iou(boxes, targets.to(boxes)).nan_to_num(0) * _is_box(targets).to(boxes)


def _coco():
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise AjpqError(
            "average precision needs the package pycocotools, but it is not installed; pip install 'ajpq[detection]' "
            "or set task.average_precision=false"
        ) from error
    return coco.COCO, cocoeval.COCOeval


def average_precision(
    boxes: Tensor, confidences: Tensor, targets: Tensor, most: int = 100, overlap: float = 0.45, least: float = 0.005
) -> dict[str, float]:
    """ "map50" and "map" of COCO for one class: boxes (N, B, 4), confidences (N, B), targets (N, M, 4).

    Boxes below the confidence `least` are left out, then those that a surer one meets by more IoU than `overlap`, then
    all but the `most` surest. Fractions of an image count as units of 1,000 pixels, so that COCO's classes of size
    mean nothing here.
    """
    COCO, COCOeval = _coco()
    truth, told = [], []
    for image, (corners, sure, those) in enumerate(zip(boxes, confidences, targets, strict=True)):
        for x1, y1, x2, y2 in (1000 * those[_is_box(those)]).tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": 0,
                          "area": box[2] * box[3]})  # fmt: skip
        likely = sure >= least
        corners, sure = corners[likely], sure[likely]
        kept = nms(corners, sure, overlap)[:most]
        for (x1, y1, x2, y2), score in zip((1000 * corners[kept]).tolist(), sure[kept].tolist(), strict=True):
            told.append({"image_id": image, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score})
    if not truth or not told:
        return {"map50": 0.0, "map": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {"images": [{"id": i} for i in range(len(boxes))], "annotations": truth, "info": {},
                         "categories": [{"id": 1}]}  # fmt: skip
        known.createIndex()
        judge = COCOeval(known, known.loadRes(told), "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    return {"map50": float(judge.stats[1]), "map": float(judge.stats[0])}
