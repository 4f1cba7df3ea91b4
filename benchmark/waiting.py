"""What a user waits for beside the training: checkpoints, and the start of a second run on images that are already decoded.

    python benchmark/waiting.py checkpoints                                    # the embedded runs, at their default interval
    python benchmark/waiting.py gpu                                            # ViT-B/16 on CUDA, two rounds of 1,000 steps
    python benchmark/waiting.py start path/to/flowers102_64px path/to/cub100_227px    # at 224 pixels, by ViT-B/16

The base-size models have random weights here: what is timed does not depend on their values.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmark/results/waiting.json"


def keep(key: str, found: dict) -> None:
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    machine = {"threads": torch.get_num_threads(), "machine": platform.machine()}
    known[key] = found | machine | {name: version(name) for name in ("torch", "transformers", "datasets")}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(known, indent=1) + "\n")
    print(key, json.dumps(found))


def timed(spent: list[float]):
    """Count the seconds from torch.save to the renaming of what it wrote, sync included."""
    save, rename, began = torch.save, os.replace, [0.0]

    def saved(*args, **kwargs):
        began[0] = time.perf_counter()
        save(*args, **kwargs)

    def renamed(source, target):
        rename(source, target)
        if Path(target).name == "resume.pt":
            spent.append(time.perf_counter() - began[0])

    torch.save, os.replace = saved, renamed


def checkpoints(script: str, *flags: str) -> None:
    """One whole run in this process, with its checkpoints timed."""
    spent: list[float] = []
    timed(spent)
    run_dir = tempfile.mkdtemp() + "/run"
    sys.argv = [script, "--run-dir", run_dir, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    seconds = json.loads((Path(run_dir) / "metrics.json").read_text())["seconds"]
    shutil.rmtree(run_dir)
    chip = f" ViT-B/16, compiled, two rounds of 1,000 steps of 64, {torch.cuda.get_device_name()}" if flags else ""
    keep(f"checkpoints, {script}{chip}", {"checkpoints": len(spent), "seconds": round(sum(spent), 3), "of_a_run_of": seconds,
                                          "part": round(sum(spent) / seconds, 5)})  # fmt: skip


def gpu() -> None:
    """Self-distillation of ViT-B/16 by the script itself, from a folder of 1,020 JPEGs, as many as Flowers has."""
    from speed import jpegs

    with tempfile.TemporaryDirectory() as folder:
        transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig()).save_pretrained(f"{folder}/model")
        transformers.ViTImageProcessor().save_pretrained(f"{folder}/model")
        (images := Path(folder) / "images").mkdir()
        for i, data in enumerate(jpegs(510, 375) * 2):
            (images / f"{i}.jpg").write_bytes(data)
        flags = f"--device cuda --dataset {images} --model {folder}/model --steps 1000 --save-every 500 --eval-every 0"
        checkpoints("self_distill_vit.py", *flags.split(), "--compile", "on")


def base_checkpoint() -> None:
    """The state of ViT-B/16 with its decoder and AdamW's moments, written as the scripts write it: median of three."""
    script = runpy.run_path(str(ROOT / "self_distill_vit.py"))
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    folder, times = Path(tempfile.mkdtemp()), []
    for _ in range(3):
        began = time.perf_counter()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        script["write"](folder / "resume.pt", partial(torch.save, state))
        times.append(time.perf_counter() - began)
    size = (folder / "resume.pt").stat().st_size / 1e9
    shutil.rmtree(folder)
    where = f", on the machine of {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    keep(f"one checkpoint of ViT-B/16{where}", {"seconds": round(sorted(times)[1], 2), "gigabytes": round(size, 2)})


def start(data: str, model: str) -> None:
    """Seconds from the command to its first step, the first time and the second."""
    found = {}
    cache = tempfile.mkdtemp()
    for name in ("first", "second"):
        run_dir = tempfile.mkdtemp() + "/run"
        flags = f"--dataset {data} --model {model} --run-dir {run_dir} --eval-every 0 --steps 1 --batch-size 8"
        command = [sys.executable, str(ROOT / "further_pretrain_vit.py"), *flags.split()]
        began, said = time.perf_counter(), ""
        environment = os.environ | {"HF_DATASETS_CACHE": cache}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True)
        while "further_pretrain_vit:   0%" not in said:  # the bar of the training: all is ready
            if not (new := process.stderr.read(1)):
                raise SystemExit(said)
            said += new
        found[name] = round(time.perf_counter() - began, 1)
        process.kill()
        process.wait()
    shutil.rmtree(cache)
    keep(f"start, {Path(data).name} at 224 pixels, ViT-B/16", found)


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    if sys.argv[1:2] == ["start"]:
        folder = tempfile.mkdtemp()
        transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig()).save_pretrained(folder)
        transformers.ViTImageProcessor().save_pretrained(folder)
        for data in sys.argv[2:]:
            start(data, folder)
        shutil.rmtree(folder)
    elif sys.argv[1:2] == ["checkpoints"]:
        base_checkpoint()
        for name in ("self_distill_vit.py", "self_distill_roberta.py", "finetune.py"):
            subprocess.run([sys.executable, __file__, "of", name], check=True)
    elif sys.argv[1:2] == ["gpu"]:
        base_checkpoint()
        gpu()
    elif sys.argv[1:2] == ["of"]:
        checkpoints(sys.argv[2])
    else:
        raise SystemExit(__doc__)
