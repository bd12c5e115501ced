"""A small vision transformer for images of 32×32 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchlethe.arguments import check_within
from torchlethe.models.base import FeatureNetwork
from torchlethe.models.checks import check_count


class _Attention(nn.Module):
    """Multi-head self-attention, written out.

    Not the fused kernel: with 65 tokens it gains little, and it has no second derivative, which several of our methods
    need.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5, dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class _Block(nn.Module):
    """LayerNorm and attention, LayerNorm and a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class VisionTransformer(FeatureNetwork):
    """Vision transformer with a class token, Dosovitskiy et al. 2021 (arXiv:2010.11929), in the sizes of DeiT.

    Touvron et al. 2021 (arXiv:2012.12877) give the sizes tiny (192 wide, 3 heads) and small (384 wide, 6 heads), both
    12 deep. Features are the class token behind the final LayerNorm. No BatchNorm: training on two ranks equals
    training on the joined batch. Linear and position weights are initialised from N(0, 0.02²), truncated at two
    standard deviations.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch; divides ``image_size``.
        width: Width of the tokens; ``heads`` divides it.
        depth: Number of blocks.
        heads: Number of attention heads.
        dropout: Probability behind attention and perceptron, in [0, 1).

    Raises:
        ValueError: ``patch_size`` does not divide ``image_size``, ``heads`` does not divide ``width``, or another
            argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 4,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_channels, exact_size=check_count("image_size", image_size))
        if image_size % check_count("patch_size", patch_size):
            raise ValueError(f"patch_size must divide image_size, got {patch_size} and {image_size}.")
        if check_count("width", width) % check_count("heads", heads):
            raise ValueError(f"heads must divide width, got {heads} and {width}.")
        check_within(0, 1, "[)", dropout=dropout)
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(_Block(width, heads, dropout) for _ in range(check_count("depth", depth))))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, num_classes)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                nn.init.zeros_(module.bias)

    def embed(self, image: Tensor) -> Tensor:  # noqa: D102
        patches = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(image.shape[0], -1, -1), patches), dim=1)
        # The classifier reads one token, and LayerNorm works token by token.
        return self.norm(self.blocks(tokens + self.positions)[:, 0])


def vit_tiny(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 32, patch_size: int = 4, dropout: float = 0.0
) -> nn.Module:
    """Build the tiny vision transformer: 5 362 762 parameters (10 classes, RGB, 32×32, patches of 4×4).

    See :class:`VisionTransformer`; 192 wide, 12 deep, 3 heads.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch; divides ``image_size``.
        dropout: Probability behind attention and perceptron, in [0, 1).

    Returns:
        The network, randomly initialised.
    """
    return VisionTransformer(num_classes, in_channels, image_size, patch_size, 192, 12, 3, dropout)


def vit_small(
    num_classes: int = 10, in_channels: int = 3, image_size: int = 32, patch_size: int = 4, dropout: float = 0.0
) -> nn.Module:
    """Build the small vision transformer: 21 342 346 parameters (10 classes, RGB, 32×32, patches of 4×4).

    See :class:`VisionTransformer`; 384 wide, 12 deep, 6 heads.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images.
        image_size: Height and width of the images, in pixels.
        patch_size: Height and width of a patch; divides ``image_size``.
        dropout: Probability behind attention and perceptron, in [0, 1).

    Returns:
        The network, randomly initialised.
    """
    return VisionTransformer(num_classes, in_channels, image_size, patch_size, 384, 12, 6, dropout)
