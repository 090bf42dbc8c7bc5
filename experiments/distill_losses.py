"""Distillation losses, weight-only: Tables 2 and 5 and Figures 1, 6 and 7 of Ding et al. on the ladder's VARs.

Every loss starts from the same rounding to nearest and takes the same steps on the same images. `ce` is plain
quantization-aware training: no teacher.
"""

from bitlaw import Study

LOSSES = ("ce", "mse", "js", "forward-kl", "reverse-kl", "topkld", "topkld-printed")

study = Study(
    name="distill-losses",
    models=tuple(f"ladder/var-{size}" for size in ("xs", "s", "m", "l")),
    precisions=("W16A16", "W8A16", "W4A16", "W3A16", "W2A16"),
    methods=("rtn", *(f"distill:{loss},steps=200,start=rtn" for loss in LOSSES)),
    description="Quantization-aware training of four VARs by seven losses, 200 steps each.",
)
