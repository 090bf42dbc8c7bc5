"""Drawing and scoring together."""

import torch

import bitlaw
from bitlaw.metrics.evaluation import cyclic_labels, draw_features, feature_network
from bitlaw.metrics.features import extract_features


def test_features_of_images_that_are_not_kept_are_those_of_all_images() -> None:
    """600 images in three goes of 250, of which 270 are kept."""
    model = bitlaw.load("ladder/var-xs")
    network, labels = feature_network("ladder"), cyclic_labels(600, model.num_classes)
    sizes: list[int] = []
    features, kept = draw_features(
        model, network, labels, seed=3, batch_size=50, num_kept=270, progress=lambda count: sizes.append(count)
    )
    images = model.generate(labels, seed=3, batch_size=50)
    whole = list(extract_features(network, images, 250))
    assert torch.equal(features.pooled_BD, torch.cat([part.pooled_BD for part in whole]))
    assert features.logprobs_BC is not None and len(features.logprobs_BC) == 600
    assert torch.equal(kept, images[:270]) and sum(sizes) == 600


def test_no_image_need_be_kept() -> None:
    model = bitlaw.load("ladder/var-xs")
    features, kept = draw_features(model, feature_network("ladder"), cyclic_labels(3, 12), seed=0)
    assert kept.shape == (0, 3, 24, 24) and len(features.pooled_BD) == 3
