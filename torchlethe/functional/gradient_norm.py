"""The norm of the weights' gradient that a single image causes, as a function of the image.

Source: Shen et al., "TensorClog: An Imperceptible Poisoning Attack on Deep Neural Network Applications", IEEE Access
2019; ``TensorClog`` of lhfowl/adversarial_poisons takes the gradient of a whole batch, here it is that of each image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def squared_gradient_norms(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """‖∇_θ CE(h_θ(x), y)‖₂² of each image, over all parameters that require a gradient.

    It can be differentiated with respect to the images; as a square is monotonic, the signs of that gradient are those
    of the norm's.

    Args:
        network: in eval mode, in a state that :func:`~torchlethe.functional.mean_loss.differentiable_twice` makes.
        image: (B, C, H, W) in [0, 1].
        label: (B,) int64.

    Returns:
        (B,) float.
    """
    weights = {name: p.detach() for name, p in network.named_parameters() if p.requires_grad}
    constants = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
    constants |= dict(network.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(network, (weights, constants), (image[None],)), label[None])

    def squared_norm(image: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss)(weights, image, label)
        return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()

    return vmap(squared_norm, randomness="different")(image, label)
