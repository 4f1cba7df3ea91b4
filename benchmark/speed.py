"""How fast the scripts' own `update` is, beside the recipe as published and beside what a user would pick instead.

    python benchmark/speed.py                                     # embedded texts; base-size models with random weights
    python benchmark/speed.py --texts path/to/scierc --work roberta_mlm
    python benchmark/speed.py --device cuda --vit-batch 64 --text-batch 128    # and again with --compile

Everything is timed in one process in alternating blocks, the first of each left out, so that whatever else the machine does
falls on both alike. Ratios are of samples per second, ours over theirs; each block gives one ratio, their median and range
are printed. `Trainer` needs `pip install accelerate`.

naive        the published recipe, as in the authors' trainer.py: each image decoded at each visit (on CUDA by two workers,
             ahead of the step), the teacher run at each step, two backward passes, torch's default AdamW, loss.item() at each
             step, fp32 without TF32; for texts, which they did not publish, the same, one backward pass, logits of the
             vocabulary at all tokens, texts in random order
full_logits  ours, but logits at all tokens, on batches of the same texts
library's    own loss: of a model that is handed labels, logits and a cross-entropy at all tokens, the others ignored
without ...  ours, but for one thing: what each gives
trainer      transformers.Trainer: with DataCollatorForLanguageModeling, as run_mlm.py --line_by_line does; with
             ViTMAEForPreTraining and crops and flips drawn anew at each visit, as run_mae.py does; by default in fp32, and
             images are read in the process that trains. On CUDA also in bf16, with eight threads that read ahead
profile      on CUDA: whether the GPU's work or giving it that work takes the time
vit_job      on CUDA: a round from the first byte of the images to the last step; from its parts, one of the paper's 20,000
"""

import importlib.util
import io
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from unittest import mock
from weakref import WeakSet

import datasets
import numpy as np
import torch
import transformers
import tyro
from PIL import Image
from torch.nn.functional import cross_entropy, linear, mse_loss
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from transformers import (
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

ROOT = Path(__file__).parent.parent
WORKS = ("vit_distill", "vit_mae", "roberta_mlm", "roberta_logits", "roberta_distill", "tiny_vit_job", "tiny_roberta_job",
         "gains", "baselines")  # fmt: skip


@dataclass
class Args:
    work: tuple[str, ...] = WORKS
    """what to time; vit_job and profile as well, on CUDA"""
    device: str = "cpu"
    """cpu or cuda; on CUDA ours runs in bf16, theirs in fp32 as published, without TF32"""
    texts: Path | None = None
    """a folder that load_dataset reads, with a split `train` and a column `text`; default the embedded docstrings"""
    vit_batch: int = 8
    """images a step of ViT-B/16"""
    text_batch: int = 16
    """texts a step of RoBERTa-base"""
    images: int = 32
    """different images of self-distillation on ViT-B/16; the teacher looks at each once before the clock starts"""
    blocks: int = 5
    """alternations, after one to warm up"""
    steps: int | None = None
    """optimizer steps in each block; default 2, and 20 on CUDA"""
    tiny_steps: int = 100
    """optimizer steps of a whole job of the tiny models: the embedded recipe's"""
    compile: bool = False
    """ours with its layers compiled"""
    out: Path = Path("benchmark/results/speed.json")
    """results are added to this file, by work and device"""


def script(name: str):
    """One of the five scripts as a module: what is timed is its own functions."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait(device: str) -> float:
    """The time, when the device has done all it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """What a large matrix product reaches here, in FLOP/s: the best of six."""
    n = 8192 if device == "cuda" else 1536
    a, b, best = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype), 0.0
    for _ in range(6):
        start = wait(device)
        a @ b
        best = max(best, 2 * n**3 / (wait(device) - start))
    return best


AHEAD: WeakSet[futures.Future] = WeakSet()  # what an arm reads ahead of its step


def compare(args: Args, ours: Callable, theirs: dict[str, Callable]) -> dict:
    """Blocks of `steps` calls in turn. Each call is one optimizer step and returns its number of samples."""
    speeds, memory = {name: [] for name in ("ours", *theirs)}, {}
    for block in range(args.blocks + 1):
        for name, step in (("ours", ours), *theirs.items()):
            futures.wait(AHEAD)  # what the last arm still reads would slow this one down
            if args.device == "cuda":  # of this arm, with the weights of the others beside it
                torch.cuda.reset_peak_memory_stats()
            start = wait(args.device)
            samples = sum(step() for _ in range(args.steps))
            if args.device == "cuda":
                peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)  # of a graph, what its first steps took
                memory[name] = {"peak_memory_gb": max(peak, memory.get(name, {}).get("peak_memory_gb", 0))}
            if block:  # the first is to warm up
                speeds[name].append(samples / (wait(args.device) - start))
            print(f"  block {block} {name}: {samples / (wait(args.device) - start):.2f} samples/s", flush=True)
    found = {name: {"samples_per_second": round(statistics.median(s), 3), "range": [round(min(s), 3), round(max(s), 3)]}
             | memory.get(name, {}) for name, s in speeds.items()}  # fmt: skip
    for name in theirs:
        ratios = [a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)]
        found[name] |= {"ours_is_times": round(statistics.median(ratios), 3)}
        found[name] |= {"ratios": [round(min(ratios), 3), round(max(ratios), 3)]}
    return found


def rows(work: str, found: dict) -> list[str]:
    """The arms of a work, and of its parts, as rows of a table; an empty cell is what was not measured."""
    out, keys = [], ("ours_is_times", "ratios", "utilisation", "peak_memory_gb")
    for arm, values in found.items():
        if isinstance(values, dict) and {"samples_per_second", "seconds"} & values.keys():
            speed = values.get("samples_per_second") or values["seconds"]
            cells = [work, arm, speed, values.get("range"), *map((found | values if arm != "ours" else values).get, keys)]
            cells = ["" if cell is None else cell for cell in cells]
            out.append("| " + " | ".join(", ".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells) + " |")
        elif isinstance(values, dict) and arm not in ("args", "versions"):
            out += rows(f"{work}, {arm}", values)
    return out


def plain_adamw(model: torch.nn.Module, rate: float, betas: tuple[float, float], eps: float = 1e-8) -> torch.optim.AdamW:
    """As a user writes it: not fused."""
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, eps=eps, weight_decay=0.01)


def pixels_in_fp32(model: torch.nn.Module, device: str) -> torch.nn.Module:
    """What `load_model` of the image scripts does to a model: see there."""
    projection, side = model.vit.embeddings.patch_embeddings.projection, model.config.image_size // model.config.patch_size

    @torch.autocast(device, enabled=False)
    def project(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = pixels.unflatten(3, (side, -1)).unflatten(2, (side, -1)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    projection.forward = project.__get__(projection)
    return model


def compile_layers(model: torch.nn.Module) -> None:
    """As --compile on does in the scripts."""
    for layers in [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]:
        [layer.compile() for layer in layers]


def with_graph(args: Args, module, *constant) -> Callable:
    """A script's `update`, on CUDA from the fourth step on as one graph, as its loop does. Takes what each step has anew."""
    step, taken = module.update, 0

    def one(*changing, eager: bool = False) -> None:
        nonlocal step, taken
        inputs = [*constant[:3], *changing[:2], constant[3], *changing[2:], *constant[4:]]
        taken += 1
        if args.device == "cuda" and taken > 3 and step is module.update and not eager:
            step = module.as_cuda_graph(module.update, *inputs)
        (module.update if eager else step)(*inputs)

    return one


def in_autocast(model: torch.nn.Module, device: str, bf16: bool):
    """As accelerate does it for Trainer once train() is called: the forward pass alone."""
    return mock.patch.object(model, "forward", torch.autocast(device, torch.bfloat16, enabled=bf16)(model.forward))


def switches(ours: bool, texts: bool = False) -> None:
    """What the scripts set for a whole process, and what is torch's default."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = ours
    torch.backends.cuda.enable_cudnn_sdp(not (ours and texts))


def utilisation(args: Args, step: Callable, speed: float, dtype: torch.dtype) -> dict:
    """FLOP of one step as counted by torch, and the part of a measured matrix product's speed that the step reaches."""
    with FlopCounterMode(display=False) as counter:
        samples = step()
    flops, peak = counter.get_total_flops() / samples, peak_flops(args.device, dtype)
    return {"gflop_per_sample": round(flops / 1e9, 2), "matmul_gflop_per_second": round(peak / 1e9),
            "utilisation": round(flops * speed / peak, 3)}  # fmt: skip


# ------------------------------------------------------------------------------------------------ images
def jpegs(n: int, side: int) -> list[bytes]:
    """Encoded images: smooth noise, so that decoding costs what it does for photographs."""
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 255, (side // 16, side // 16, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer := io.BytesIO(), "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out


def decoded(data: bytes, size: int) -> torch.Tensor:
    """One image as the published data loader does it, at each visit: decode, resize, to float, normalise."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor((0.485, 0.456, 0.406))[:, None, None]) / torch.tensor((0.229, 0.224, 0.225))[:, None, None]


def whole_cls(model: ViTMAEForPreTraining, pixels: torch.Tensor) -> torch.Tensor:
    """CLS vectors of whole images, all of every layer computed."""
    model.config.mask_ratio, ratio = 0.0, model.config.mask_ratio
    order = torch.arange(model.vit.embeddings.patch_embeddings.num_patches, device=pixels.device).expand(len(pixels), -1)
    hidden = model.vit(pixels, noise=order).last_hidden_state
    model.config.mask_ratio = ratio
    return hidden[:, 0]


def vit_steps(args: Args, config: ViTMAEConfig, batch: int, files: list[bytes], rate: float = 1e-4):
    """(ours, naive): functions that take one step of self-distillation on a new batch; and a batch's reading alone."""
    sd, n, size, device = script("self_distill_vit"), len(files), config.image_size, torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    norm = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], device=args.device)[..., None, None]
    torch.manual_seed(0)
    teacher = ViTMAEForPreTraining(config).to(args.device).eval()
    students = [ViTMAEForPreTraining(config).to(args.device).train() for _ in range(2)]
    pixels_in_fp32(students[0], args.device)
    if args.compile:
        compile_layers(students[0])
    flags = sd.Args(learning_rate=rate, warmup_ratio=0.0)
    patches, rng = teacher.vit.embeddings.patch_embeddings.num_patches, np.random.default_rng(0)

    def prepare() -> tuple:  # done once a job
        rows = datasets.Dataset.from_list([{"input": {"bytes": data, "path": None}} for data in files])
        images = sd.decode_all(rows.cast_column("input", datasets.Image()), "train", size)
        if args.device == "cuda":
            images = torch.from_numpy(np.stack(images)).cuda()
        return images, sd.encode_all(teacher.vit, images, norm, autocast)

    state: dict = {}
    optimizer = sd.optimizer_and_schedule(students[0], flags, 10**6, (0.9, 0.95))
    one_step = with_graph(args, sd, students[0], *optimizer, autocast, flags)
    theirs = plain_adamw(students[1], rate, (0.9, 0.95))

    def ours(eager: bool = False) -> int:
        switches(ours=True)
        if not state:
            state["images"], state["teacher"] = prepare()
        rows = rng.integers(0, n, batch)
        noise, pixels = sd.upload(rng.random((batch, patches), np.float32), device), sd.take(state["images"], rows, norm, size)
        one_step(pixels, noise, state["teacher"][sd.upload(rows, device)], eager=eager)
        return batch

    def reading() -> int:
        sd.take(state["images"], rng.integers(0, n, batch), norm, size)
        return batch

    workers, ahead = futures.ThreadPoolExecutor(2), []

    def load(rows: np.ndarray) -> torch.Tensor:
        return torch.stack([decoded(files[i], size) for i in rows])

    there: list[torch.Tensor] = []  # one batch that is read already

    def naive(read: bool = True) -> int:
        switches(ours=False)
        while args.device == "cuda" and read and len(ahead) < 3:
            ahead.append(workers.submit(load, rng.integers(0, n, batch)))
            AHEAD.add(ahead[-1])
        if not read:
            there[:] = there or [load(rng.integers(0, n, batch)).to(args.device)]
            pixels = there[0]
        else:
            pixels = ahead.pop(0).result().pin_memory().cuda() if ahead else load(rng.integers(0, n, batch))
        theirs.zero_grad()
        loss = students[1](pixels, noise=torch.rand(batch, patches, device=args.device)).loss
        loss.backward()
        with torch.no_grad():
            target = whole_cls(teacher, pixels)
        (mse_loss(whole_cls(students[1], pixels), target, reduction="sum") / batch).backward()
        theirs.step()
        loss.item()
        return batch

    return ours, naive, reading, state, dtype


def vit_distill(args: Args) -> dict:
    """A step of self-distillation on ViT-B/16."""
    ours, naive, reading, _, dtype = vit_steps(args, ViTMAEConfig(norm_pix_loss=True), args.vit_batch, jpegs(args.images, 375))
    others = {"naive": naive} | ({"naive, nothing to read": partial(naive, False)} if args.device == "cuda" else {})
    found = compare(args, ours, others)
    speed = found["ours"]["samples_per_second"]
    found["ours"] |= utilisation(args, partial(ours, eager=True), speed, dtype)
    start = wait(args.device)
    times = sum(reading() for _ in range(20))
    found["ours"]["reading_part_of_step"] = round((wait(args.device) - start) / times * speed, 5)
    return found


def vit_mae(args: Args) -> dict:
    """A step of further pre-training on ViT-B/16, beside Trainer's."""
    fp, files, batch = script("further_pretrain_vit"), jpegs(32, 375), args.vit_batch
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    norm, rng = torch.tensor([mean, std], device=args.device)[..., None, None], np.random.default_rng(0)
    torch.manual_seed(0)
    mine, its = (ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).to(args.device).train() for _ in range(2))
    optimizer = fp.optimizer_and_schedule(mine, fp.Args(learning_rate=1e-4, warmup_ratio=0.0), 10**6, (0.9, 0.95))
    rows = datasets.Dataset.from_list([{"input": {"bytes": data, "path": None}} for data in files])
    images = fp.decode_all(rows.cast_column("input", datasets.Image()), "train", 224)
    if args.device == "cuda":
        images = torch.from_numpy(np.stack(images)).cuda()
    pixels_in_fp32(mine, args.device)
    if args.compile:
        compile_layers(mine)
    one_step = with_graph(args, fp, mine, *optimizer, autocast)

    def ours(eager: bool = False) -> int:
        switches(ours=True)
        noise = fp.upload(rng.random((batch, 196), np.float32), torch.device(args.device))
        one_step(fp.take(images, rng.integers(0, len(files), batch), norm, 224), noise, eager=eager)
        return batch

    crop = transforms.RandomResizedCrop(224, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    then = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    prepare = transforms.Compose([crop, *then])
    workers, ahead = futures.ThreadPoolExecutor(8), []

    def one(i: int) -> torch.Tensor:
        return prepare(Image.open(io.BytesIO(files[i])).convert("RGB"))

    def by_trainer(bf16: bool) -> Callable:
        flags = {"use_cpu": args.device == "cpu", "report_to": [], "disable_tqdm": True, "bf16": bf16}
        trainer = transformers.Trainer(its, options := transformers.TrainingArguments("runs/trainer", **flags))
        trainer.create_optimizer_and_scheduler(10**6)

        def step() -> int:
            switches(ours=False)
            while bf16 and len(ahead) < 4:
                ahead.append([workers.submit(one, i) for i in rng.integers(0, len(files), batch)])
                AHEAD.update(ahead[-1])
            chosen = [each.result() for each in ahead.pop(0)] if bf16 else map(one, rng.integers(0, len(files), batch))
            with in_autocast(its, args.device, bf16):
                trainer.training_step(its, {"pixel_values": torch.stack(list(chosen))}, batch)
            torch.nn.utils.clip_grad_norm_(its.parameters(), options.max_grad_norm)
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
            its.zero_grad()
            return batch

        return step

    others = {"trainer": by_trainer(False)} | ({"trainer, bf16": by_trainer(True)} if args.device == "cuda" else {})
    found = compare(args, ours, others)
    found["ours"] |= utilisation(args, partial(ours, eager=True), found["ours"]["samples_per_second"], dtype)
    return found


def whole_job(args: Args, make: Callable) -> dict:
    """From the first byte to the last step, ours and naive in turn; what is made once is made anew each time."""
    times = {"ours": [], "naive": []}
    for block in range(3):
        ours, naive, *_ = make()
        for name, step in (("ours", ours), ("naive", naive)):
            start = wait(args.device)
            samples = sum(step() for _ in range(args.tiny_steps))
            times[name].append(wait(args.device) - start)
            print(f"  job {block} {name}: {times[name][-1]:.1f} s, {samples} samples", flush=True)
    ratios = [b / a for a, b in zip(times["ours"], times["naive"], strict=True)]
    return {name: {"seconds": [round(s, 2) for s in spent]} for name, spent in times.items()} | {
        "ours_is_times": round(statistics.median(ratios), 3), "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        "steps": args.tiny_steps}  # fmt: skip


def vit_job(args: Args) -> dict:
    """A round of ViT-B/16 from 1,020 JPEGs, as many as Flowers has: ours of 300 steps, naive of 30, which has no beginning."""
    found, parts = {}, {}
    ours, naive, *_ = vit_steps(args, ViTMAEConfig(norm_pix_loss=True), args.vit_batch, jpegs(510, 375) * 2)
    for name, step, steps, early in (("ours", ours, 300, 50), ("naive", naive, 30, 1)):
        start = wait(args.device)
        for _ in range(early):  # with all that is done once: decoding, the teacher's vectors, compiling, the graph
            step()
        first = wait(args.device)
        for _ in range(steps - early):
            step()
        end = wait(args.device)
        parts[name] = first - start, early, (end - first) / (steps - early)
        found[name] = {"steps": steps, "seconds": round(end - start, 2), f"of_the_first_{early}": round(first - start, 2),
                       "of_a_later_step": round(parts[name][2], 5)}  # fmt: skip
        print(f"  {name}: {found[name]}", flush=True)
    for steps in (300, 20_000):
        seconds = {name: round(first + (steps - early) * later, 1) for name, (first, early, later) in parts.items()}
        found[f"computed for {steps} steps"] = seconds | {"ours_is_times": round(seconds["naive"] / seconds["ours"], 3)}
    return found


def profile(args: Args) -> dict:
    """Whether a step of self-distillation on base-size models waits for the GPU's work, or the GPU for being given it."""
    ours, *_ = vit_steps(args, ViTMAEConfig(norm_pix_loss=True), args.vit_batch, jpegs(64, 375))
    texts, *_ = text_steps(args, BASE(), args.text_batch, distil=True, limit=256)
    found = {}
    for name, step in (("piece by piece", partial(ours, eager=True)), ("as a graph", ours), ("texts", texts)):
        for _ in range(5):
            step()
        start = wait(args.device)
        for _ in range(20):
            step()
        given, end = time.perf_counter(), wait(args.device)
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                step()
            wait(args.device)
        on_gpu = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA and "#" not in e.key]
        busy = sum(e.self_device_time_total for e in on_gpu) / 3
        times = {"ms_a_step": (end - start) * 50, "ms_to_give_it_to_the_gpu": (given - start) * 50, "ms_busy": busy / 1e3}
        found[name] = {key: round(value, 2) for key, value in times.items()}
        found[name] |= {"kernels": round(sum(e.count for e in on_gpu) / 3)}
        print(f"  {name}: {found[name]}", flush=True)
    return found


def tiny_vit_job(args: Args) -> dict:
    """A round of the embedded image model, 400 photographs of 375 pixels, 64 a step."""
    config = ViTMAEConfig.from_pretrained(ROOT / "pretrained/vit-mae-tiny")
    files = jpegs(400, 375)

    def make():
        datasets.disable_caching()  # the decoded images of the last job
        return vit_steps(args, config, 64, files, 5e-4)

    return whole_job(args, make)


# ------------------------------------------------------------------------------------------------ texts
def every_logit(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Vocabulary logits at all tokens, of which those at the masked ones are then taken: (M, V)."""
    logits = model(input_ids=batch["masked"], attention_mask=batch["attention"]).logits
    return logits.flatten(0, 1)[batch["where"]].float()


def texts_of(args: Args, sd, tokenizer, length: int) -> list[np.ndarray]:
    if args.texts:
        rows = datasets.load_dataset(str(args.texts.resolve()), split="train")
    else:
        rows = sd.docstring_rows("train")
    rows = rows.select_columns("text").rename_column("text", "input")
    return sd.tokenize_all(rows, "train", tokenizer, length)


def text_steps(args: Args, config: RobertaConfig, batch: int, distil: bool, rate: float = 1e-4, limit: int | None = None):
    """(ours, naive, trainer, full_logits): one step each, on a new batch of the same texts."""
    sd = script("self_distill_roberta")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")
    tokenizer.model_max_length = config.max_position_embeddings - 2
    texts = texts_of(args, sd, tokenizer, tokenizer.model_max_length)[:limit]
    lengths, n = np.array([len(ids) for ids in texts]), len(texts)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    torch.manual_seed(0)
    teacher = RobertaForMaskedLM(config).to(args.device).eval()
    students = [RobertaForMaskedLM(config).to(args.device).train() for _ in range(3)]
    if args.compile:
        compile_layers(students[0])
    flags = sd.Args(learning_rate=rate, warmup_ratio=0.0, batch_size=batch, epochs=1)
    optimizer = sd.optimizer_and_schedule(students[0], flags, 10**6, (0.9, 0.98), 1e-6)
    theirs = plain_adamw(students[1], rate, (0.9, 0.98), 1e-6)
    plain = np.zeros(config.vocab_size, bool)
    plain[list(tokenizer.get_vocab().values())] = True
    plain[tokenizer.all_special_ids] = False
    rng = np.random.default_rng(0)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    state: dict = {}

    def epochs() -> Iterator[np.ndarray]:
        for t in range(10**6):
            yield from sd.batches_of_epochs(flags, t, lengths)

    mine, its = epochs(), epochs()  # of the same batches

    def ours(order: Iterator[np.ndarray] = mine) -> int:
        switches(ours=True, texts=True)
        if distil and not state:
            state["teacher"] = sd.encode_all(teacher, texts, tokenizer, autocast)
        rows = next(order)
        inputs = sd.collate(texts, rows, tokenizer, args.device, plain, 0.15, rng)
        target = state["teacher"][sd.upload(rows, torch.device(args.device))] if distil else None
        sd.update(students[0], *optimizer, inputs, autocast, target, flags)
        return len(rows)

    def full_logits() -> int:
        with mock.patch.object(sd, "masked_logits", every_logit):
            return ours(its)

    def shuffled() -> tuple[list, dict]:
        chosen = [texts[i] for i in rng.integers(0, n, batch)]
        return chosen, collator([{"input_ids": ids.tolist()} for ids in chosen]).to(args.device)

    def naive() -> int:
        switches(ours=False)
        theirs.zero_grad()
        chosen, inputs = shuffled()
        loss = students[1](input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = cross_entropy(loss.flatten(0, 1), inputs["labels"].flatten())
        if distil:
            whole = sd.collate(chosen, range(batch), tokenizer, args.device)
            with torch.no_grad():
                target = sd.encode(teacher, whole)
            loss = loss + mse_loss(sd.encode(students[1], whole), target, reduction="sum") / batch
        loss.backward()
        theirs.step()
        loss.item()
        return batch

    trainers: dict = {}

    def by_trainer(bf16: bool = False) -> int:
        switches(ours=False)
        if bf16 not in trainers:
            flags = {"use_cpu": args.device == "cpu", "report_to": [], "disable_tqdm": True, "bf16": bf16}
            options = transformers.TrainingArguments("runs/trainer", **flags)
            trainers[bf16] = transformers.Trainer(students[2], options, data_collator=collator)
            trainers[bf16].create_optimizer_and_scheduler(10**6)
        trainer, (_, inputs) = trainers[bf16], shuffled()
        with in_autocast(students[2], args.device, bf16):
            trainer.training_step(students[2], inputs, batch)
        torch.nn.utils.clip_grad_norm_(students[2].parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        students[2].zero_grad()
        return batch

    return ours, naive, by_trainer, full_logits


BASE = partial(RobertaConfig, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def roberta_mlm(args: Args) -> dict:
    """A step of further pre-training on RoBERTa-base."""
    ours, naive, trainer, full_logits = text_steps(args, BASE(), args.text_batch, distil=False)
    others = {"trainer": trainer, "naive": naive, "full_logits": full_logits}
    others |= {"trainer, bf16": partial(trainer, True)} if args.device == "cuda" else {}
    return compare(args, ours, others)  # no utilisation: batches differ in length, and with it in operations


def roberta_logits(args: Args) -> dict:
    """A step of further pre-training on RoBERTa-base, texts of 128 tokens: logits at the masked ones, and at all."""
    fp, rng = script("further_pretrain_roberta"), np.random.default_rng(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")
    ids = np.concatenate(texts_of(args, fp, tokenizer, 512))
    texts = list(ids[: len(ids) // 128 * 128].reshape(-1, 128))  # end to end, so that none is padded
    model, allowed = RobertaForMaskedLM(BASE()).to(args.device).train(), np.arange(50265) < 8192
    allowed[tokenizer.all_special_ids] = False
    optimizer = fp.optimizer_and_schedule(model, fp.Args(learning_rate=1e-4, warmup_ratio=0.0), 10**6, (0.9, 0.98), 1e-6)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    if args.compile:
        compile_layers(model)

    switches(ours=True, texts=True)

    def ours() -> int:
        rows = rng.integers(0, len(texts), args.text_batch)
        batch = fp.collate(texts, rows, tokenizer, torch.device(args.device), allowed, 0.15, rng)
        fp.update(model, *optimizer, batch, autocast)
        return len(rows)

    def full_logits() -> int:
        with mock.patch.object(fp, "masked_logits", every_logit):
            return ours()

    def library() -> int:
        rows = rng.integers(0, len(texts), args.text_batch)
        batch = fp.collate(texts, rows, tokenizer, torch.device(args.device), allowed, 0.15, rng)
        labels = torch.full_like(batch["ids"], -100).flatten()  # -100: not to be predicted
        labels[batch["where"]] = batch["ids"].flatten()[batch["where"]]
        labels = labels.view_as(batch["ids"])
        with autocast:
            loss = model(input_ids=batch["masked"], attention_mask=batch["attention"], labels=labels).loss
        loss.backward()
        optimizer[0].step()
        optimizer[1].step()
        optimizer[0].zero_grad()
        return len(rows)

    return compare(args, ours, {"full_logits": full_logits, "library's own loss": library})


def roberta_distill(args: Args) -> dict:
    """A step of self-distillation on RoBERTa-base."""
    ours, naive, *_ = text_steps(args, BASE(), args.text_batch, distil=True, limit=256)
    ours()  # the teacher's vectors, of few texts here: once a round, see the whole jobs for what they cost
    return compare(args, ours, {"naive": naive})


def tiny_roberta_job(args: Args) -> dict:
    """A round of the embedded text model, 32 texts a step."""
    config = RobertaConfig.from_pretrained(ROOT / "pretrained/roberta-tiny")
    return whole_job(args, lambda: text_steps(args, config, 32, distil=True, rate=5e-4))


# ------------------------------------------------------------------------------------------------ one thing at a time
def gains(args: Args) -> dict:
    """Self-distillation steps of base-size models with one thing left out: `ours_is_times` is what that one gives."""
    found, autocast = {}, torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    fp32 = torch.autocast(args.device, torch.bfloat16, enabled=False)  # with TF32 on CUDA
    rng, dev, gpu = np.random.default_rng(0), torch.device(args.device), args.device == "cuda"

    def without(step: Callable, model, attention: str = "sdpa", **patches) -> Callable:
        def run() -> int:
            for module in model.modules():  # the decoder of a ViT-MAE has a configuration of its own
                if hasattr(module, "config"):
                    module.config._attn_implementation = attention
            with ExitStack() as stack:
                for name, (module, value) in patches.items():
                    stack.enter_context(mock.patch.object(module, name, value))
                return step()

        return run

    torch.manual_seed(0)
    sd, batch = script("self_distill_vit"), args.vit_batch
    model, teacher = (ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True)).to(dev).train() for _ in range(2))
    for each in (model, teacher):
        pixels_in_fp32(each, args.device)
    flags = sd.Args(learning_rate=1e-4, warmup_ratio=0.0)
    optimizer, scheduler = sd.optimizer_and_schedule(model, flags, 10**6, (0.9, 0.95))
    plain, target = plain_adamw(model, 1e-4, (0.9, 0.95)), torch.randn(batch, 768, device=dev)

    def images(optimizer=optimizer, live: bool = False, autocast=autocast, eager: bool = not gpu) -> Callable:
        one_step = with_graph(args, sd, model, optimizer, scheduler, autocast, flags)

        def step() -> int:
            pixels = torch.randn(batch, 3, 224, 224, device=dev)
            noise = torch.rand(batch, 196, device=dev)
            with torch.no_grad(), autocast:
                cls = sd.encode(teacher.vit, pixels) if live else target
            one_step(pixels, noise, cls, eager=eager)
            return batch

        return step

    def full(vit, pixels, representation="cls"):
        return whole_cls(model if vit is model.vit else teacher, pixels)

    switches(ours=True)
    found["vit-b/16"] = compare(args, without(images(), model), {
        "without the teacher's vectors kept": without(images(live=True), model),
        "without sparing the last layer's MLP": without(images(), model, encode=(sd, full)),
        "without SDPA attention": without(images(), model, attention="eager")}
        | ({"without the graph": without(images(eager=True), model),
            "without the graph and fused AdamW": without(images(plain, eager=True), model),
            "without bf16, but TF32": without(images(autocast=fp32), model)} if gpu else
           {"without fused AdamW": without(images(plain), model)}))  # fmt: skip

    td, batch, config = script("self_distill_roberta"), args.text_batch, BASE()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")
    texts = texts_of(args, td, tokenizer, 512)[: 5 * batch]  # a block is one pass over them, so that all see the same texts
    lengths = np.array([len(ids) for ids in texts])
    model = RobertaForMaskedLM(config).to(dev).train()
    flags = td.Args(learning_rate=1e-4, warmup_ratio=0.0, batch_size=batch, epochs=1)
    optimizer, scheduler = td.optimizer_and_schedule(model, flags, 10**6, (0.9, 0.98), 1e-6)
    plain, allowed = plain_adamw(model, 1e-4, (0.9, 0.98), 1e-6), np.arange(config.vocab_size) < 8192
    allowed[tokenizer.all_special_ids] = False
    cls = torch.randn(batch, 768, device=dev)
    like = {True: lengths, False: np.ones_like(lengths)}  # grouped by length, and not
    orders = {grouped: cycle(td.batches_of_epochs(flags, 0, of)) for grouped, of in like.items()}

    def words(optimizer=optimizer, grouped: bool = True, autocast=autocast) -> int:
        rows = next(orders[grouped])
        inputs = td.collate(texts, rows, tokenizer, dev, allowed, 0.15, rng)
        td.update(model, optimizer, scheduler, inputs, autocast, cls[: len(rows)], flags)
        return len(rows)

    switches(ours=True, texts=True)
    found["roberta-base"] = compare(replace(args, steps=5), without(words, model), {
        "without logits at masked tokens alone": without(words, model, masked_logits=(td, every_logit)),
        "without texts of similar length together": without(partial(words, grouped=False), model),
        "without SDPA attention": without(words, model, attention="eager"),
        "without fused AdamW": without(partial(words, optimizer=plain), model)}
        | ({"without bf16, but TF32": without(partial(words, autocast=fp32), model)} if gpu else {}))  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------------ fine-tuning
def baselines(args: Args) -> dict:
    """A step of each baseline beside plain fine-tuning: here `ours_is_times` is how many plain steps one costs."""
    ft, found = script("finetune"), {}
    rng = torch.Generator().manual_seed(0)
    kinds = {
        "vit-b/16": (lambda: ViTForImageClassification(ViTConfig(num_labels=200)), args.vit_batch,
                     {"pixel_values": torch.randn(args.vit_batch, 3, 224, 224, generator=rng)}),
        "roberta-base": (lambda: RobertaForSequenceClassification(BASE(num_labels=7)), args.text_batch,
                         {"input_ids": torch.randint(5, 50000, (args.text_batch, 64), generator=rng)}),
    }  # fmt: skip
    for kind, (make, batch, inputs) in kinds.items():
        switches(ours=True, texts=kind == "roberta-base")
        model = make().to(args.device).train()
        inputs = {key: value.to(args.device) for key, value in inputs.items()}
        targets = torch.zeros(batch, dtype=torch.long, device=args.device)
        anchors = [(p, p.detach().clone(), name.startswith("classifier")) for name, p in model.named_parameters()]
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
        flags = {m: ft.Args(method=m, learning_rate=1e-5, warmup_ratio=0.0, recadam_strength=5000, recadam_midpoint=250)
                 for m in ("finetune", "recadam", "mars", "r3f")}  # fmt: skip
        optimizer, scheduler = ft.optimizer_and_schedule(model, flags["finetune"], 10**6, (0.9, 0.999))

        def step(method, model=model, optimizer=optimizer, scheduler=scheduler, inputs=inputs, targets=targets,
                 autocast=autocast, anchors=anchors, flags=flags, batch=batch) -> int:  # fmt: skip
            ft.update(model, optimizer, scheduler, inputs, targets, autocast, anchors, 250, batch, flags[method])
            return batch

        others = {method: partial(step, method) for method in ("recadam", "mars", "r3f")}
        found[kind] = compare(args, partial(step, "finetune"), others)  # ours_is_times: how many plain steps one costs
    return found


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.steps = args.steps or (20 if args.device == "cuda" else 2)
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    chip = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    if args.device == "cpu" and Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        chip = names[0] if names else chip
    for work in args.work:
        print(work, flush=True)
        torch.compiler.reset()  # no work's compiled layers count for the next
        found = globals()[work](args)
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found |= {
            "hardware": chip, "threads": torch.get_num_threads(), "peak_memory_gb_of_process": round(memory / 2**30, 2),
            "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
            "args": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(args).items()},
        }  # fmt: skip
        found["args"] |= {"texts": args.texts and args.texts.name, "out": args.out.name}  # no machine's own paths
        known[f"{work} {args.device}" + " compiled" * args.compile] = found
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps({key: found[key] for key in found if key not in ("args", "versions")}, indent=1), flush=True)
    print(f"wrote {args.out}, {chip}, {torch.get_num_threads()} threads:\n\n| work | arm | samples/s, or seconds of jobs |"
          " range | ours is faster by | range | of a product's FLOP/s | peak memory, GiB |\n" + "|---" * 8 + "|")  # fmt: skip
    for work in args.work:
        print("\n".join(rows(work, known[f"{work} {args.device}" + " compiled" * args.compile])))
