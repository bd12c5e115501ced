"""Networks and what belongs to them: factories for YAML, normalisation, the features/head split.

Every network is an ``nn.Module`` whose ``forward`` takes images ``(B, C, H, W)`` and returns logits. The functions are
factories that serve as ``class_path`` in YAML (``torchlethe.models.resnet18``).
"""

from torchlethe.models.autoencoder import Autoencoder
from torchlethe.models.base import FeatureNetwork, parameter_count
from torchlethe.models.cifar_resnet import CifarResNet, resnet8, resnet20, resnet32, resnet56
from torchlethe.models.densenet import DenseNet, densenet121
from torchlethe.models.heads import features_of, head_name, head_of, replace_head
from torchlethe.models.hubs import timm_network, torchvision_network
from torchlethe.models.huggingface import TransformersClassifier
from torchlethe.models.inception import GoogLeNet, googlenet
from torchlethe.models.layout import channels_last_on_cpu, wants_channels_last
from torchlethe.models.normalize import STATISTICS, Normalize, NormalizedClassifier, normalized
from torchlethe.models.outputs import features_and_logits
from torchlethe.models.preact_resnet import PreActResNet, preact_resnet18, senet18
from torchlethe.models.pyramidnet import PyramidNet, pyramidnet110
from torchlethe.models.resnet import ResNet, resnet18, resnet34
from torchlethe.models.small import MLP, SmallCNN
from torchlethe.models.vgg import VGG, vgg16_bn
from torchlethe.models.vit import VisionTransformer, vit_small, vit_tiny
from torchlethe.models.wide_resnet import WideResNet, wrn28_2, wrn28_10

__all__ = [
    "MLP",
    "STATISTICS",
    "VGG",
    "Autoencoder",
    "CifarResNet",
    "DenseNet",
    "FeatureNetwork",
    "GoogLeNet",
    "Normalize",
    "NormalizedClassifier",
    "PreActResNet",
    "PyramidNet",
    "ResNet",
    "SmallCNN",
    "TransformersClassifier",
    "VisionTransformer",
    "WideResNet",
    "channels_last_on_cpu",
    "densenet121",
    "features_and_logits",
    "features_of",
    "googlenet",
    "head_name",
    "head_of",
    "normalized",
    "parameter_count",
    "preact_resnet18",
    "pyramidnet110",
    "replace_head",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet56",
    "senet18",
    "timm_network",
    "torchvision_network",
    "vgg16_bn",
    "vit_small",
    "vit_tiny",
    "wants_channels_last",
    "wrn28_2",
    "wrn28_10",
]
