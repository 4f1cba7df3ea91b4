"""What a step of self-distillation costs as batch, number of images, length of texts and model grow: a table and a picture.

    python benchmark/growth.py

Operations are counted by torch's own counter on tensors without storage, so they are exact for any size. Seconds are measured
where a step fits on this CPU and computed from the operations elsewhere, at the speed of the largest step measured of that
kind; the table and the picture say which.
"""

import importlib.util
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaForMaskedLM, ViTMAEConfig, ViTMAEForPreTraining

matplotlib.use("Agg")
ROOT = Path(__file__).parent.parent
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
VIT = {
    "tiny": lambda: ViTMAEConfig.from_pretrained(ROOT / "pretrained/vit-mae-tiny"),
    "base": lambda: ViTMAEConfig(norm_pix_loss=True), "large": lambda: ViTMAEConfig(norm_pix_loss=True, **LARGE),
}  # fmt: skip
VOCABULARY = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
TEXT = {
    "tiny": lambda: RobertaConfig.from_pretrained(ROOT / "pretrained/roberta-tiny"),
    "base": lambda: RobertaConfig(**VOCABULARY), "large": lambda: RobertaConfig(**VOCABULARY, **LARGE),
}  # fmt: skip


@dataclass
class Args:
    out: Path = Path("benchmark/results/growth.json")
    """numbers; the picture goes beside it"""
    memory: Path = Path("benchmark/results/memory.json")
    """what benchmark/memory.py measured, for the third picture"""
    repeats: int = 3
    """steps measured for each point, after one to warm up; the median is kept"""


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vit_loss(sd, model, batch: int) -> torch.Tensor:
    """Both losses of a step, the teacher's vectors being there."""
    config, device = model.config, model.device
    pixels = torch.zeros(batch, 3, config.image_size, config.image_size, device=device)
    noise = torch.rand(batch, (config.image_size // config.patch_size) ** 2, device=device)
    return model(pixels, noise=noise).loss + sd.encode(model.vit, pixels).pow(2).sum(1).mean()


def text_loss(sd, model, batch: int, length: int) -> torch.Tensor:
    """The same for texts of one length, 15 % of the tokens to predict."""
    ids = torch.full((batch, length), 7, device=model.device)
    where = torch.arange(0, batch * length, 7, device=model.device)  # one in seven
    inputs = {"ids": ids, "masked": ids, "attention": None, "where": where, "start": ids[:, 0] * 0}
    loss = cross_entropy(sd.masked_logits(model, inputs), ids.flatten()[where])
    return loss + sd.encode(model, inputs).pow(2).sum(1).mean()


def point(make, loss, measure: bool, repeats: int) -> dict:
    """GFLOP of a forward and a backward pass, and seconds if it is to be measured."""
    with torch.device("meta"):
        model = make().train()
        with FlopCounterMode(display=False) as counter:
            loss(model).backward()
    found = {"gflop": counter.get_total_flops() / 1e9}
    if measure:
        model, times = make().train(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for _ in range(repeats + 1):
            start = time.perf_counter()
            loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
        found["seconds"] = statistics.median(times[1:])
    return found


def main(args: Args) -> dict:
    vit, text = script("self_distill_vit"), script("self_distill_roberta")
    found = {}
    batches = (("tiny", (8, 16, 32, 64, 128), 128), ("base", (1, 2, 4, 8, 16, 64), 8), ("large", (1, 4, 16, 64), 0))
    lengths = (("tiny", (16, 32, 64, 128), 128), ("base", (32, 64, 128, 256, 512), 256), ("large", (32, 128, 512), 0))
    for name, sizes, limit in batches:  # measured up to the limit
        for batch in sizes:
            key, make = f"vit {name}, batch {batch}", lambda name=name: ViTMAEForPreTraining(VIT[name]())
            found[key] = point(make, lambda m, b=batch: vit_loss(vit, m, b), batch <= limit, args.repeats)
            print(key, found[key], flush=True)
    for name, sizes, limit in lengths:
        for length in sizes:
            key, make = f"roberta {name}, 4 texts of {length}", lambda name=name: RobertaForMaskedLM(TEXT[name]())
            found[key] = point(make, lambda m, n=length: text_loss(text, m, 4, n), length <= limit, args.repeats)
            print(key, found[key], flush=True)
    for kind in ("vit", "roberta"):  # what was not measured runs at the speed of the largest that was
        points = {key: f for key, f in found.items() if key.startswith(kind)}
        speed = max((f for f in points.values() if "seconds" in f), key=lambda f: f["gflop"])
        for f in points.values():
            f["measured"] = "seconds" in f
            if not f["measured"]:
                f["seconds"] = f["gflop"] * speed["seconds"] / speed["gflop"]
    known = json.loads(args.memory.read_text()) if args.memory.exists() else {}
    for n in (1000, 3000, 10_000, 30_000, 100_000):  # pixels and vectors are exact, memory is benchmark/memory.py's
        key = f"{n} images of 224"
        found[key] = {"pixels_gb": n * 3 * 224**2 / 1e9, "teacher_vectors_gb": n * 768 * 4 / 1e9}
        if key in known:
            peaks = known[key]["peak_while_decoding"], known[key]["peak_while_reading"]
            found[key]["memory_gb"] = max(peak["Pss_Anon"] for peak in peaks)
    return found


def draw(found: dict, path: Path) -> None:
    """Seconds a step: full marks are measured, hollow ones computed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, kind, label in zip(axes, ("vit", "roberta"), ("images a step", "tokens a text, 4 texts a step"), strict=False):
        for colour, name in zip(("#4477aa", "#cc6677", "#228833"), ("tiny", "base", "large"), strict=True):
            points = [(int(key.split()[-1]), f) for key, f in found.items() if key.startswith(f"{kind} {name}")]
            axis.plot([x for x, _ in points], [f["seconds"] for _, f in points], color=colour, label=name, lw=1.5)
            for x, f in points:
                axis.plot(x, f["seconds"], "o", color=colour, mfc=colour if f["measured"] else "white", ms=6)
        axis.set(xscale="log", yscale="log", xlabel=label, title={"vit": "ViT-MAE", "roberta": "RoBERTa"}[kind])
        axis.set_xticks(sorted({int(key.split()[-1]) for key in found if key.startswith(kind)}), minor=False)
        axis.get_xaxis().set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    images = {int(key.split()[0]): f for key, f in found.items() if key.endswith("images of 224")}
    for colour, name, label in (("#4477aa", "pixels_gb", "pixels, mapped from the disk"), ("#228833", "memory_gb", "memory"),
                                ("#cc6677", "teacher_vectors_gb", "teacher's vectors")):  # fmt: skip
        points = [(n, f[name]) for n, f in images.items() if name in f]
        face = colour if name == "memory_gb" else "white"
        axes[2].plot(*zip(*points, strict=True), "o-", color=colour, mfc=face, lw=1.5, label=label)
    axes[2].set(xscale="log", yscale="log", xlabel="images of 224 pixels", ylabel="gigabytes", title="Number of images")
    axes[2].grid(alpha=0.3)
    axes[2].legend(frameon=False)
    axes[0].set_ylabel("seconds a step of self-distillation")
    axes[0].legend(title="filled: measured, hollow: computed", frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    found = main(args)
    record = {"threads": torch.get_num_threads(), "machine": platform.machine(), "versions": {"torch": version("torch")}}
    record |= {"points": found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1, default=float) + "\n")
    draw(found, args.out.with_suffix(".png"))
    measured = np.sum([f.get("measured", False) for f in found.values()])
    print(f"wrote {args.out} and its picture: {len(found)} points, {measured} of them measured")
