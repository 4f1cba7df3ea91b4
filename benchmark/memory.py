"""Memory of this process while N images are decoded at 224 pixels and then read in random batches, as the scripts do both.

    python benchmark/memory.py --images 100000        # 15 GB of cache, removed at the end

Anonymous memory is what the process needs; pages of the mapped cache file come on top while there is room, and are given back.
"""

import importlib.util
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import tyro
from PIL import Image

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    images: int = 100_000
    """how many"""
    size: int = 224
    """pixels a side once decoded"""
    batches: int = 300
    """random batches of 64 to read"""
    out: Path = Path("benchmark/results/memory.json")
    """results are added to this file"""


def memory() -> dict[str, float]:
    """Gigabytes of anonymous and of file-backed memory in RAM, of this process and its workers; shared: a part each."""
    total = {"Pss_Anon": 0.0, "Pss_File": 0.0}
    own = Path("/proc/self/stat").read_text().split()[0]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
            if own in (status["Pid"].strip(), status["PPid"].strip()):
                sizes = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
                total = {key: total[key] + int(sizes[key].split()[0]) / 2**20 for key in total}
        except (OSError, ValueError):
            continue
    return total


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    cache = Path(tempfile.mkdtemp(dir=".")).resolve()
    datasets.config.HF_DATASETS_CACHE = cache
    spec = importlib.util.spec_from_file_location("further_pretrain_vit", ROOT / "further_pretrain_vit.py")
    sys.modules[spec.name] = fp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fp)
    peak, over = {"Pss_Anon": 0.0, "Pss_File": 0.0}, threading.Event()

    def watch():
        while not over.wait(0.5):
            for key, value in memory().items():
                peak[key] = max(peak[key], value)

    threading.Thread(target=watch, daemon=True).start()
    try:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        one = {"image": {"bytes": buffer.getvalue(), "path": None}, "label": 0}
        many = lambda: (one | {"label": i % 10} for i in range(args.images))  # noqa: E731
        rows = datasets.Dataset.from_generator(many, cache_dir=str(cache))
        rows.cast_column("image", datasets.Image()).to_parquet(cache / "d.parquet")
        found, start = {"before": memory()}, time.time()
        flags = fp.Args(dataset=str(cache / "d.parquet"))
        data, _ = fp.load_data(flags, fp.IMAGE_SETS, None, lambda kind: isinstance(kind, datasets.Image),
                               lambda part, split: fp.decode_all(part, split, args.size), ("train",))  # fmt: skip
        found |= {"decode_seconds": round(time.time() - start), "peak_while_decoding": dict(peak)}
        images, rng = data["train"][0], np.random.default_rng(0)
        norm = torch.zeros(2, 3, 1, 1) + torch.tensor([0.5, 0.25]).view(2, 1, 1, 1)
        peak |= dict.fromkeys(peak, 0.0)
        start = time.time()
        for _ in range(args.batches):
            fp.take(images, rng.integers(0, len(images), 64), norm, args.size)
        found |= {"seconds_a_batch_of_64": (time.time() - start) / args.batches, "peak_while_reading": dict(peak)}
    finally:
        over.set()
        shutil.rmtree(cache)
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    known[f"{args.images} images of {args.size}"] = found
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(found, indent=1))
