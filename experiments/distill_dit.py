"""Quantization-aware training of the ladder's DiTs: Figure 1 (right) of Ding et al.

`task` is plain training on the noise, `mse` distillation of what the teacher predicts.
"""

from bitlaw import Study

study = Study(
    name="distill-dit",
    models=tuple(f"ladder/dit-{size}" for size in ("xs", "s", "m", "l")),
    precisions=("W16A16", "W8A16", "W4A16", "W3A16", "W2A16", "W8A8", "W4A8"),
    methods=("rtn", "distill:task,steps=200,lr=2e-3", "distill:mse,steps=200,start=rtn"),
    description="Quantization-aware training of four DiTs, with and without a teacher, 200 steps each.",
)
