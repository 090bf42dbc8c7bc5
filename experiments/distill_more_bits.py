"""Distillation at 4 and 8 bits, with quantized activations, and to floating-point weights: Tables 2, 3 and 5, Figures
6 and 7 of Ding et al. on the ladder's VARs. We2m1 has 4 bits, We2m0 3.
"""

from bitlaw import Study

STEPS = "steps=200,lr=2e-3"
FEW = ("rtn", f"distill:forward-kl,{STEPS}", f"distill:topkld,{STEPS}")
ALL = ("rtn", *(f"distill:{loss},{STEPS}" for loss in ("ce", "mse", "js", "forward-kl", "reverse-kl", "topkld")))

study = Study(
    name="distill-more-bits",
    models=tuple(f"ladder/var-{size}" for size in ("xs", "s", "m", "l")),
    precisions=("W16A16", "W8A16", "W4A16", "W8A8", "W4A8", "We2m1A16", "We2m0A16"),
    methods=FEW,
    methods_at={"W4A16": ALL},
    description="Four VARs at 4 and 8 bits, with activations of 8 bits, and in floating point, distilled 200 steps.",
)
