"""How good the images are: Fréchet distances, inception score, kernel distance, precision and recall.

Each metric is a function of features; a `FeatureNetwork` makes those of uint8 images, and a `Score` keeps the
`Protocol` it was measured with.
"""

from bitlaw.metrics.features import FeatureNetwork, Features, InceptionTorchScript, LadderFeatures, extract_features
from bitlaw.metrics.fid import FeatureStatistics, frechet_distance, frechet_interval
from bitlaw.metrics.inception_score import InceptionScore, inception_score, inception_score_interval
from bitlaw.metrics.kid import KID, kernel_distance
from bitlaw.metrics.precision_recall import PrecisionRecall, precision_recall
from bitlaw.metrics.protocol import ACROSS_FAMILIES, Interval, Protocol, Score
from bitlaw.metrics.samples import image_grid, read_samples, write_grid, write_samples

__all__ = [
    "ACROSS_FAMILIES",
    "KID",
    "FeatureNetwork",
    "FeatureStatistics",
    "Features",
    "InceptionScore",
    "InceptionTorchScript",
    "Interval",
    "LadderFeatures",
    "PrecisionRecall",
    "Protocol",
    "Score",
    "extract_features",
    "frechet_distance",
    "frechet_interval",
    "image_grid",
    "inception_score",
    "inception_score_interval",
    "kernel_distance",
    "precision_recall",
    "read_samples",
    "write_grid",
    "write_samples",
]
