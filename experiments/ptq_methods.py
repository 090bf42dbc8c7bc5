"""Post-training methods and the bit-level law: Figures 5, 8, 9 and 10 of Ding et al. on the ladder.

Weight-only: rounding to nearest against second-order (GPTQ), vector (GPTVQ) and first-order (OmniQuant) methods; at 8
bits a two-dimensional codebook would have 65,536 entries, so GPTVQ has one dimension there. With quantized activations:
SmoothQuant, the same with GPTQ behind it, and OmniQuant, whose learned transformation then takes part.
"""

from bitlaw import Study
from bitlaw.scaling.sweep import LADDER_STUDY

WEIGHTS_ONLY = ("rtn", "gptq", "gptvq", "omniquant")
WITH_ACTIVATIONS = ("rtn", "smoothquant", "smoothquant+gptq", "omniquant")

study = Study(
    name="ptq-methods",
    models=LADDER_STUDY.models,
    precisions=("W16A16", "W8A16", "W4A16", "W3A16", "W2A16", "W8A8", "W4A8", "W4A6"),
    methods=WEIGHTS_ONLY,
    methods_at={
        "W8A16": ("rtn", "gptq", "gptvq:dim=1", "omniquant"),
        "W8A8": WITH_ACTIVATIONS,
        "W4A8": WITH_ACTIVATIONS,
        "W4A6": WITH_ACTIVATIONS,
    },
    calibration={"num_images": 256, "batch_size": 32, "rows_per_input": 64},
    description="Post-training methods on four VAR and four DiT models, weight-only and with quantized activations.",
)
