"""Distillation with quantized activations, and floating-point weights: Table 3, Figures 6 and 7 of Ding et al.

We2m1 has 4 bits, We2m0 3.
"""

from bitlaw import Study

study = Study(
    name="distill-activations",
    models=tuple(f"ladder/var-{size}" for size in ("xs", "s", "m", "l")),
    precisions=("W16A16", "W8A8", "W4A8", "We2m1A16", "We2m0A16"),
    methods=("rtn", "distill:forward-kl,steps=200,start=rtn", "distill:topkld,steps=200,start=rtn"),
    description="W8A8, W4A8 and floating-point weights of four VARs, distilled by forward KL and TopKLD.",
)
