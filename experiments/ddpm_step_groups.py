"""Uniform precision of a pixel DDPM with calibrated ranges in 10 groups of steps, beside `ddpm_mixed.py`, whose uniform
precision has one range for all steps: what groups give by their ranges, and what by their widths."""

from bitlaw import Study

study = Study(
    name="ddpm-step-groups",
    models=("ladder/ddpm-s",),
    precisions=tuple(f"W{bits}A{bits}c" for bits in (8, 7, 6, 5, 4, 3)),
    num_images=1000,
    sampling={"num_steps": 10},
    step_groups=10,
    description="A pixel DDPM in uniform precision, ranges of inputs in 10 groups of steps.",
)
