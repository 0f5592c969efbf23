"""Networks to compress: built here (residual, MobileNetV1, SkyNet) or by name from torchvision and timm."""

from ajpq.models.mobilenet import MobileNetV1 as MobileNetV1
from ajpq.models.mobilenet import mobilenet_v1 as mobilenet_v1
from ajpq.models.named import timm_model as timm_model
from ajpq.models.named import torchvision_model as torchvision_model
from ajpq.models.residual import BasicBlock as BasicBlock
from ajpq.models.residual import PadShortcut as PadShortcut
from ajpq.models.residual import ResidualNet as ResidualNet
from ajpq.models.residual import cifar_resnet as cifar_resnet
from ajpq.models.residual import digits_cnn as digits_cnn
from ajpq.models.residual import resnet20 as resnet20
from ajpq.models.skynet import SkyNet as SkyNet
from ajpq.models.skynet import skynet as skynet
