"""K of TopKLD at W3A16: Table 4 of Ding et al. on the smallest and the largest VAR, whose vocabulary has 512 codes.

The paper's K are 400 to 800 of 4096 codes. K = 0 is forward KL, 512 is reverse KL, and 128 the default: these three are
in `distill_losses.py` (seed 0) and `distill_seeds.py` (seed 1).
"""

from bitlaw import Study

study = Study(
    name="distill-k",
    models=("ladder/var-xs", "ladder/var-l"),
    precisions=("W16A16", "W3A16"),
    methods=tuple(f"distill:topkld,top_k={k},steps=200,lr=2e-3" for k in (32, 64, 256)),
    seeds=(0, 1),
    description="TopKLD with three more K, two seeds.",
)
