"""Integer against floating-point weights, and groups, on one small model of each family."""

from bitlaw import Study

study = Study(
    name="formats",
    models=("ladder/var-s", "ladder/dit-s"),
    precisions=("W16A16", "W4A16", "We2m1A16", "W4g16A16"),
    num_images=1000,
)
