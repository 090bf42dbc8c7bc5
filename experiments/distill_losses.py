"""Distillation losses at 3 and 2 bits, weight-only: Tables 2 and 5 and Figures 1, 6 and 7 of Ding et al. on the VARs.

Every loss starts from the same rounding to nearest and takes the same steps on the same images. `ce` is plain
quantization-aware training: no teacher. 4 and 8 bits are in `distill_more_bits.py`.
"""

from bitlaw import Study

LOSSES = ("ce", "mse", "js", "forward-kl", "reverse-kl", "topkld", "topkld-printed")

study = Study(
    name="distill-losses",
    models=tuple(f"ladder/var-{size}" for size in ("xs", "s", "m", "l")),
    precisions=("W16A16", "W3A16", "W2A16"),
    methods=("rtn", "gptq", *(f"distill:{loss},steps=200,lr=2e-3" for loss in LOSSES)),
    calibration={"num_images": 256, "batch_size": 32, "rows_per_input": 64},
    description="Quantization-aware training of four VARs at 3 and 2 bits by seven losses, 200 steps each.",
)
