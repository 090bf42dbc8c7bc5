"""Mixed precision of a pixel DDPM: Tables 1 to 5 of the rate-distortion paper on the ladder's DDPM.

The mean over all layers but the first and the last is 8 to 3 bits, of weights alone, and of weights and inputs with
calibrated ranges. Against one precision for all; in 1, 2 and 10 groups of steps; allocated by MSE instead of MSE +
SSIM; and carried out by GPTQ instead of rounding. Curves are measured on 4 images, 10 steps each, to keep it short.
"""

from bitlaw import Study

MIXED = "mixed:num_images=4"
MSE, GPTQ = f"{MIXED},measure=mse", f"{MIXED},then=gptq"
GROUPS = (MIXED, f"{MIXED},step_groups=2", f"{MIXED},step_groups=10")
METHODS_AT = {f"W{bits}A16": ("rtn", MIXED) for bits in (8, 7, 6)}
METHODS_AT |= {f"W{bits}A16": ("rtn", MIXED, MSE, "gptq", GPTQ) for bits in (5, 4, 3)}
METHODS_AT |= {f"W{bits}A{bits}c": ("rtn", *GROUPS) for bits in (8, 7)}
METHODS_AT |= {f"W{bits}A{bits}c": ("rtn", *GROUPS, MSE) for bits in (6, 5, 4, 3)}

study = Study(
    name="ddpm-mixed",
    models=("ladder/ddpm-s",),
    precisions=("W16A16", *METHODS_AT),
    methods_at=METHODS_AT,
    num_images=1000,
    sampling={"num_steps": 10},
    description="A pixel DDPM with a mean of 8 to 3 bits: by rate-distortion curves, against uniform precision.",
)
