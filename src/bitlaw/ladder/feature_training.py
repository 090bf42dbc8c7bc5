"""Train the ladder's feature network: class, texture, background and the continuous factors of each image.

Light noise and blur are added to half of the images, so that noise nobody sees does not move the features.

Legend: B images, C channels, H, W pixels, F factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bitlaw.ladder.data import Images, to_float
from bitlaw.metrics.features import LadderFeatureNet
from bitlaw.training import step_generator


def augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation up to 0.1 on half of the images, a 3x3 blur of random strength on half."""
    count = (len(x_BCHW), 1, 1, 1)
    blur_B111 = torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    blurred = F.avg_pool2d(F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x_BCHW = torch.lerp(x_BCHW, blurred, 0.6 * blur_B111)
    noise_B111 = 0.1 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    return x_BCHW + noise_B111 * torch.randn(x_BCHW.shape, generator=generator)


def feature_loss(net: LadderFeatureNet, batch: Images, step: int) -> Tensor:
    """Cross entropies of class, texture and background plus the mean squared error of the factors."""
    heads = net(augment(to_float(batch.images_BCHW), step_generator(step)))
    factors = batch.factors
    return (
        F.cross_entropy(heads.class_logits_12, batch.labels_B)
        + 0.5 * F.cross_entropy(heads.texture_logits_3, factors.texture)
        + 0.5 * F.cross_entropy(heads.background_logits_2, factors.background)
        + F.mse_loss(heads.factors_BF, factors.continuous_BF())
    )
