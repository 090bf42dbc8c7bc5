"""K of TopKLD at W3A16: Table 4 of Ding et al. on the ladder's VARs, whose vocabulary has 512 codes.

The paper's K are 400 to 800 of 4096 codes; 0 is forward KL and 512 reverse KL.
"""

from bitlaw import Study

study = Study(
    name="distill-k",
    models=("ladder/var-xs", "ladder/var-l"),
    precisions=("W16A16", "W3A16", "W2A16"),
    methods=tuple(f"distill:topkld,top_k={k},steps=200,lr=2e-3" for k in (0, 32, 64, 128, 256, 512)),
    seeds=(0, 1),
    description="TopKLD with six K, two seeds.",
)
