"""The losses of `distill_losses.py` once more on the smallest and the largest VAR, with another seed of training and
evaluation."""

from bitlaw import Study

study = Study(
    name="distill-seeds",
    models=("ladder/var-xs", "ladder/var-l"),
    precisions=("W16A16", "W3A16", "W2A16"),
    methods=tuple(f"distill:{loss},steps=200,lr=2e-3" for loss in ("ce", "forward-kl", "reverse-kl", "topkld")),
    seeds=(1,),
    description="Four losses with a second seed.",
)
