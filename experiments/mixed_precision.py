"""Mixed precision against one precision for all: weights of 4 and 3 bits in the mean, to nearest or by GPTQ.

Does an allocation by rate-distortion curves move the law? `mixed` measures them on 16 images, codes rounded to nearest.
"""

from bitlaw import Study
from bitlaw.scaling.sweep import LADDER_STUDY

study = Study(
    name="mixed-precision",
    models=LADDER_STUDY.models,
    precisions=("W16A16", "W4A16", "W3A16"),
    methods=("rtn", "mixed", "gptq", "mixed:then=gptq"),
    calibration={"num_images": 256, "batch_size": 32, "rows_per_input": 64},
    description="Weights of 4 and 3 bits in the mean, by rate-distortion curves, against uniform precision.",
)
