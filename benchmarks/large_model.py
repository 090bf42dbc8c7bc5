"""A VAR of the size of the released d16 through GPTQ W4A16: peak memory, time, and going on after a kill.

Network and tokenizer have the official configuration and random weights, which cost what trained ones do. The model is
quantized three times in processes of their own: once undisturbed; once killed (SIGKILL) as soon as the block before
`--kill-at` is finished; and once more in the same work folder. Peak memory is that of a whole process, 1.2 GB of
weights in full precision and as much for their copy included.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import bitlaw
from bitlaw.models.autoencoders.multi_scale_vq import VQTokenizer, VQTokenizerConfig
from bitlaw.models.networks.var import VARConfig, VARTransformer
from bitlaw.models.var import VAR
from bitlaw.packing import pack_network
from harness import finish, one_thread

DEPTH = 16
LARGEST_PEAK = 24 * 2**30


def random_var() -> VAR:
    """d16 with random weights, of which no branch is zero."""
    torch.manual_seed(0)
    net = VARTransformer(VARConfig(depth=DEPTH, width=1024, heads=16))
    tokenizer = VQTokenizer(VQTokenizerConfig())
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return VAR(net.eval().requires_grad_(False), tokenizer.eval().requires_grad_(False))


def quantize(work: Path, num_images: int) -> None:
    """Quantize it; prints a digest of all codes with what is stored beside them."""
    settings = bitlaw.Calibration(num_images=num_images, batch_size=min(num_images, 4))
    small = bitlaw.quantize(random_var(), "W4A16", method="gptq", calibration=settings, work=work)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(pack_network(small.net).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    notes = small.provenance["sites"].values()
    errors = {stage: sum(note[stage]["error"] for note in notes) / len(notes) for stage in ("before", "gptq")}
    print(json.dumps({"digest": digest.hexdigest(), "sites": len(notes), **errors}))


@dataclass(frozen=True)
class Run:
    """What became of a process: seconds, peak memory in bytes, and what it printed; None if it was killed."""

    wall_s: float
    cpu_s: float
    peak: int
    printed: dict[str, str | int | float] | None

    def __str__(self) -> str:
        return f"{self.wall_s:.0f} s ({self.cpu_s:.0f} s of CPU), peak {self.peak / 2**30:.2f} GiB"


def run(work: Path, num_images: int, kill_after: str | None = None) -> Run:
    """Quantize in a process of its own, which is killed once the work folder holds the file `kill_after`."""
    command = [sys.executable, __file__, "--worker", str(work), "--images", str(num_images)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"BITLAW_CACHE": ""})
    assert process.stdout is not None
    while kill_after is not None and _is_running(process.pid):
        if any(work.rglob(kill_after)):
            process.kill()
            break
        time.sleep(0.05)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # not `wait`: only this tells the peak of this very process
    process.returncode = os.waitstatus_to_exitcode(status)
    if kill_after is None and process.returncode:
        raise SystemExit(f"quantizing failed with status {process.returncode}")
    seconds = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
    return Run(*seconds, usage.ru_maxrss * 1024, json.loads(output) if output else None)


def _is_running(pid: int) -> bool:
    """Whether a child is; it can still be waited for if not."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def finished_blocks(work: Path) -> dict[str, int]:
    """Files of finished blocks, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in work.rglob("block-*.safetensors")}


def main() -> int:
    """The three runs, one after the other."""
    one_thread()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large_model.json")
    parser.add_argument("--images", type=int, default=4, help="calibration images (default 4)")
    parser.add_argument("--kill-at", type=int, default=DEPTH // 2, help="block at work when it is killed, from 1 on")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        quantize(options.worker, options.images)
        return 0
    if not 1 <= options.kill_at < DEPTH:
        parser.error(f"--kill-at {options.kill_at}: from 1 to {DEPTH - 1}")
    folder = Path(tempfile.mkdtemp(prefix="bitlaw-large-"))
    try:
        whole = run(folder / "whole", options.images)
        print(f"undisturbed: {whole}", flush=True)
        last = f"block-{options.kill_at - 1:03d}.safetensors"
        killed = run(folder / "work", options.images, kill_after=last)
        before = finished_blocks(folder / "work")
        print(f"killed in block {options.kill_at}, with {len(before)} finished: {killed}", flush=True)
        resumed = run(folder / "work", options.images)
        after = finished_blocks(folder / "work")
        print(f"resumed: {resumed}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert whole.printed is not None and resumed.printed is not None
    peak = max(each.peak for each in (whole, killed, resumed))
    said = whole.printed
    print(f"{said['sites']} sites, mean relative error {said['gptq']:.3%}, by rounding to nearest {said['before']:.3%}")
    bars = {
        f"peak memory of VAR-d16, {options.images} images: {peak / 2**30:.2f} GiB (at most 24)": peak <= LARGEST_PEAK,
        f"killed in block {options.kill_at}": killed.printed is None and len(before) == options.kill_at,
        f"resumed in {resumed.wall_s:.0f} s (undisturbed {whole.wall_s:.0f}); finished blocks were not done again": (
            len(after) == DEPTH and all(after[name] == written for name, written in before.items())
        ),
        "codes equal those of the undisturbed run": whole.printed == resumed.printed,
    }
    return finish(options.out, [], bars)


if __name__ == "__main__":
    sys.exit(main())
