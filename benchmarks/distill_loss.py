"""Losses of distillation, forward and backward, against plain autograd: time for the ladder's shapes, memory for VAR's.

The baseline of time is forward KL by `F.kl_div` on two `F.log_softmax`, 4,224 tokens of 512 codes in float32;
`F.cross_entropy` stands beside it. Memory is what the peak exceeds the inputs by, gradient included, over the size of
the logits: 256 tokens, batch 32, 16,384 codes. On a CPU that is the resident memory of a process that does nothing
else; where there is a GPU it is taken there too, from torch's allocator.

    python benchmarks/distill_loss.py
"""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlaw.distill.losses import make_loss
from harness import arguments, compare, finish, one_thread

LADDER, VAR = (4224, 512), (256 * 32, 16384)
TOP_K = {LADDER: 128, VAR: 600}
NAMES = ("ce", "mse", "js", "forward-kl", "reverse-kl", "topkld")
PLAIN, PLAIN_CE = "plain forward KL", "plain cross entropy"
SLOWEST = {"forward-kl": 1.3, "topkld": 2.0}
MEMORY = "--memory-of"


def loss_of(name: str, student_NV: Tensor, teacher_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """The mean over tokens."""
    if name == PLAIN:
        log_p, log_q = F.log_softmax(student_NV, -1), F.log_softmax(teacher_NV, -1)
        return F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1).mean()
    if name == PLAIN_CE:
        return F.cross_entropy(student_NV, tokens_N)
    top_k = TOP_K[tuple(student_NV.shape)] if name == "topkld" else None
    return make_loss(name, vocab_size=student_NV.shape[1], top_k=top_k)(student_NV, teacher_NV, tokens_N).mean()


def inputs(shape: tuple[int, int], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student, which are to have a gradient, and of a teacher; true tokens."""
    g = torch.Generator(device).manual_seed(0)
    teacher_NV = torch.randn(shape, generator=g, device=device).mul_(2)
    student_NV = torch.randn(shape, generator=g, device=device).add_(teacher_NV)
    tokens_N = torch.randint(shape[1], shape[:1], generator=g, device=device)
    return student_NV.requires_grad_(), teacher_NV, tokens_N


def once(name: str, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Forward and backward; the loss."""
    tensors[0].grad = None
    loss = loss_of(name, *tensors)
    loss.backward()
    return loss.item()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory(name: str, device: str) -> float:
    """Peak beyond the inputs, over the size of the logits. Libraries are loaded by a tiny loss before."""
    once(name, inputs(LADDER, device))
    tensors = inputs(VAR, device)
    if device == "cpu":
        before = resident("VmRSS")
        once(name, tensors)
        peak = resident("VmHWM")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(name, tensors)
        peak = torch.cuda.max_memory_allocated()
    return (peak - before) / (tensors[0].numel() * tensors[0].element_size())


def memory_in_fresh_process(name: str, device: str) -> float:
    """`memory`, whose peak is then of nothing else."""
    command = [sys.executable, __file__, MEMORY, name, device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Time of all losses, then the memory of each."""
    one_thread()
    if sys.argv[1:2] == [MEMORY]:
        print(memory(*sys.argv[2:]))
        return 0
    options = arguments(__doc__, "distill_loss", rounds=15)
    tensors = inputs(LADDER)
    contenders = {name: lambda name=name: once(name, tensors) for name in (PLAIN, PLAIN_CE, *NAMES)}
    comparison = compare(f"{LADDER[0]} tokens, {LADDER[1]} codes", contenders, baseline=PLAIN, rounds=options.rounds)
    requirements = {}
    for name, most in SLOWEST.items():
        times = 1 / comparison.speedup(name)
        requirements[f"{name}: {times:.2f} times the time of plain forward KL (at most {most})"] = times <= most
    error = abs(comparison.results["forward-kl"] / comparison.results[PLAIN] - 1)
    requirements[f"forward-kl: the plain one's value to {error:.1e} (at most 1e-5)"] = error <= 1e-5
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        plain = memory_in_fresh_process(PLAIN, device)
        for name in NAMES:
            sizes = memory_in_fresh_process(name, device)
            text = f"{name} on {device}: {sizes:.2f} times the logits (at most 2.2; plain forward KL {plain:.2f})"
            requirements[text] = sizes <= 2.2
            print(text, flush=True)
    return finish(options.out, [comparison], requirements)


if __name__ == "__main__":
    sys.exit(main())
