"""A Gaussian fitted to a mixture of two under forward KL, reverse KL and TopKLD: Figure 7a of Ding et al.

The figure's mixture is not given in numbers. Here the teacher is 0.65 N(-2, 0.7) + 0.35 N(2, 1.0), standard deviations,
on 512 equally spaced codes from -8 to 8; the student a Gaussian with a mean and a log standard deviation, its logits
those of the same codes. Each loss is minimised by L-BFGS-B from a grid of starts and the best end is kept, with the
other minima beside it. K is a share of the codes; as many lie in the teacher's set.

    python experiments/divergences.py --out divergences       (JSON and PNG; the picture needs Chromium)
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from scipy.optimize import minimize
from torch import Tensor

from bitlaw.distill.losses import Divergence, TopKLD, make_loss
from bitlaw.figures import write_figure
from bitlaw.files import write_json

MIXTURE = ((0.65, -2.0, 0.7), (0.35, 2.0, 1.0))
"""Weight, mean and standard deviation of each."""
AXIS_V = torch.linspace(-8, 8, 512, dtype=torch.float64)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)
DRAWN_SHARE = 0.25
START_MEANS, START_SDS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0), (0.5, 1.0, 2.0, 3.0)


def gaussian(mean: float | Tensor, log_sd: float | Tensor) -> Tensor:
    """Logits of the codes."""
    return -((AXIS_V - mean) / torch.as_tensor(log_sd, dtype=torch.float64).exp()).square() / 2


def teacher() -> Tensor:
    """Log-probabilities of the mixture's codes (V,)."""
    parts = [torch.tensor(weight / sd).log() + gaussian(mean, float(np.log(sd))) for weight, mean, sd in MIXTURE]
    return torch.stack(parts).logsumexp(0).log_softmax(-1)


def fit(loss: Divergence, teacher_V: Tensor) -> dict[str, Any]:
    """The best mean and standard deviation, and the other minima that the starts end in."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.tensor(x, requires_grad=True)
        value = loss(gaussian(*parameters)[None], teacher_V[None]).sum()
        value.backward()
        return value.item(), parameters.grad.numpy()

    bounds = [(-8.0, 8.0), (float(np.log(0.1)), float(np.log(20.0)))]
    ends = []
    for mean, sd in itertools.product(START_MEANS, START_SDS):
        options = {"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9}
        end = minimize(
            value_and_gradient, [mean, np.log(sd)], jac=True, method="L-BFGS-B", bounds=bounds, options=options
        )
        ends.append({"loss": float(end.fun), "mean": float(end.x[0]), "sd": float(np.exp(end.x[1]))})
    minima: list[dict[str, float]] = []
    for end in sorted(ends, key=lambda end: end["loss"]):
        if all(abs(end["mean"] - other["mean"]) + abs(end["sd"] - other["sd"]) > 0.02 for other in minima):
            minima.append(end)
    best, *others = minima
    student_V = gaussian(best["mean"], float(np.log(best["sd"]))).softmax(-1)
    inside = (AXIS_V - best["mean"]).abs() <= 1.96 * best["sd"]
    covered = float(teacher_V.exp()[inside].sum())
    least = teacher_V.exp() < teacher_V.exp().max() / 10
    return best | {
        "teacher_mass_within_1.96_sd": covered,
        "student_mass_where_teacher_below_a_tenth_of_its_mode": float(student_V[least].sum()),
        "other_minima": others,
    }


def fits(teacher_V: Tensor) -> dict[str, dict[str, Any]]:
    """Of every loss, TopKLD at every share and as printed at one."""
    vocab_size = len(teacher_V)
    losses = {"forward KL": make_loss("forward-kl", vocab_size=vocab_size)}
    for share in SHARES:
        losses[f"TopKLD, K = {share:.0%} of codes"] = make_loss(
            "topkld", vocab_size=vocab_size, top_k=round(share * vocab_size)
        )
    drawn_k = round(DRAWN_SHARE * vocab_size)
    losses[f"as printed, K = {DRAWN_SHARE:.0%} of codes"] = TopKLD(drawn_k, as_printed=True)
    losses["reverse KL"] = make_loss("reverse-kl", vocab_size=vocab_size)
    return {name: fit(loss, teacher_V) for name, loss in losses.items()}


def draw(path: Path, teacher_V: Tensor, results: dict[str, dict[str, Any]]) -> None:
    """The teacher and the three students, by headless Chromium."""
    width = float(AXIS_V[1] - AXIS_V[0])
    x = AXIS_V.numpy()
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=(teacher_V.exp() / width).numpy(), name="teacher", fill="tozeroy", line={"color": "#9aa5b1"}
    )
    shown = ("forward KL", "reverse KL", f"TopKLD, K = {DRAWN_SHARE:.0%} of codes")
    for name, colour in zip(shown, ("#0072b2", "#d55e00", "#009e73"), strict=True):
        best = results[name]
        y = gaussian(best["mean"], float(np.log(best["sd"]))).softmax(-1) / width
        label = f"{name}: mean {best['mean']:.2f}, sd {best['sd']:.2f}"
        figure.add_scatter(x=x, y=y.numpy(), name=label, line={"color": colour, "width": 3})
    figure.update_layout(
        template="plotly_white",
        width=860,
        height=420,
        margin={"l": 60, "r": 20, "t": 30, "b": 50},
        legend={"x": 0.99, "xanchor": "right", "y": 0.98},
        xaxis_title="code",
        yaxis_title="probability density",
    )
    write_figure(path, figure)


def main() -> None:
    """Fit, print, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for divergences.json and divergences.png")
    out: Path = parser.parse_args().out
    teacher_V = teacher()
    results = fits(teacher_V)
    for name, best in results.items():
        others = "; ".join(f"({m['mean']:.2f}, {m['sd']:.2f}) at {m['loss']:.4f}" for m in best["other_minima"])
        print(f"{name:30} mean {best['mean']:6.3f}  sd {best['sd']:.3f}  loss {best['loss']:.4f}  others: {others}")
    out.mkdir(parents=True, exist_ok=True)
    codes = {"low": float(AXIS_V[0]), "high": float(AXIS_V[-1]), "count": len(AXIS_V)}
    write_json(out / "divergences.json", {"mixture": MIXTURE, "codes": codes, "fits": results})
    draw(out / "divergences.png", teacher_V, results)


if __name__ == "__main__":
    main()
