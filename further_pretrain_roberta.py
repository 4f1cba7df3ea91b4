# Read update() first, then the loop below it; what is above THE METHOD serves these two. The paper's algorithm is what
# `diff further_pretrain_roberta.py self_distill_roberta.py` shows. Documentation: README.md, "One file, one stage".
"""Further pre-training of a RoBERTa on unlabelled texts by masked language modelling.

Algorithm 2 of "Self-Distillation for Further Pre-training of Transformers" (Lee et al., ICLR 2023): start from a
pre-trained masked language model, go on with the same objective (hide 15 % of the tokens, predict them) on the target texts.

    python further_pretrain_roberta.py                    # 2,000 docstrings, a tiny RoBERTa, no download: a minute on a CPU
    python further_pretrain_roberta.py --dataset acl_arc  # the paper's recipe: RoBERTa-base, 100 epochs, on a GPU
"""

import ast
import glob
import hashlib
import importlib.util
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
from multiprocess import active_children, current_process  # no slip of the pen: `datasets` decodes with this fork
from sklearn.model_selection import train_test_split
from torch.nn.utils import get_total_norm, parameters_to_vector
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SCRIPT = Path(__file__).resolve()
# name: (Hub id, options of load_dataset, input column, label column, number of classes, train split, train rows, test rows)
TEXT_SETS = {
    "docstrings": (None, {}, "text", "label", 8, "train", 2000, 480),
    "chemprot": ("zapsdcn/chemprot", {}, "text", "label", 13, "train", 4169, 3469),
    "acl_arc": ("zapsdcn/citation_intent", {}, "text", "label", 6, "train", 1688, 139),
    "scierc": ("nsusemiehl/SciERC", {}, "text", "label", 7, "train", 3219, 974),
    "twitter_emotion": ("cardiffnlp/tweet_eval", {"name": "emotion"}, "text", "label", 4, "train", 3257, 1421),
}
NAMES = list(TEXT_SETS)
# Values of flags left at None: the paper's set-up (Gururangan et al.'s of 2020 where it follows them; *_every: ours), and
# for the embedded docstrings a small run on a CPU (ours, not tuned).
RECIPES = {
    "paper": {"model": "FacebookAI/roberta-base", "epochs": 100, "batch_size": 128, "learning_rate": 1e-4,
              "warmup_ratio": 0.06, "save_every": 2000, "eval_every": 500, "log_every": 50},
    "docstrings": {"model": str(SCRIPT.parent / "pretrained/roberta-tiny"), "epochs": 3, "batch_size": 32,
                   "learning_rate": 5e-4, "save_every": 100, "eval_every": 160, "log_every": 10},
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
KNN_TEXTS = 2000  # texts that the k-NN probe looks at (ours): enough to see a trend, cheap beside the training
# The six of requirements.txt that have enough prose (tyro and mlxtend do not), and two that those require.
LIBRARIES = ("datasets", "pandas", "scipy", "sklearn", "tensorboard", "torch", "torchvision", "transformers")
SCRUB = re.compile(r"[\w/-]+(\.\w+)+|\b(py)?(torch\w*|transformers|datasets|tensor(board|flow)\w*|scikit.?learn|sklearn|scipy"
                   r"|pandas|pd|numpy|np|hugging ?face\w*)\b", re.IGNORECASE)  # fmt: skip


@dataclass
class Args:
    dataset: str = "docstrings"
    """a data set of the paper (scierc, ...), the embedded docstrings, or what load_dataset reads: folder, file, Hub id"""
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
    # of masked language modelling
    epochs: int | None = None
    """passes over the texts, in each round if there are several; default by dataset: 100 in the paper"""
    mlm_probability: float = 0.15
    """fraction of the tokens to predict: 80 % of these are masked, 10 % replaced at random, 10 % left as they are"""
    max_length: int = 512
    """tokens of a text, the rest is cut off; never more than the model takes"""


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


def mask_tokens(ids: np.ndarray, plain: np.ndarray, mask: int, share: float, rng: np.random.Generator) -> tuple:
    """Masked copy of ids (B, L); (B, L), True: to be predicted. Of these 80 % become <mask>, 10 % a random token, 10 % stay.
    plain: (vocabulary,), True for ordinary tokens; special ones and padding are neither chosen nor put in place of others."""
    chosen, how = (rng.random(ids.shape) < share) & plain[ids], rng.random(ids.shape)
    masked = np.where(chosen & (how < 0.8), mask, ids)
    masked = np.where(chosen & (how >= 0.9), rng.choice(np.flatnonzero(plain), ids.shape), masked)
    return masked, chosen


def collate(texts: list[np.ndarray], rows, tokenizer, device, plain=None, share=0.0, rng=None, rank=0, world=1) -> dict:
    """Texts `rows` padded to the longest: ids and attention (B, L), start (B,) the place of <s>; with rng also masked (B, L),
    where (M,), positions in B * L to predict, and what sums are divided by, the whole batch's tokens to predict and its texts,
    / world, as processes average their gradients. Masks are drawn for the whole batch; a process takes every world-th text."""
    starts = [k for k in (tokenizer.cls_token_id, tokenizer.bos_token_id) if k is not None]  # XLM's texts start by the latter
    ids = pad_sequence([torch.from_numpy(texts[i]) for i in rows], True, tokenizer.pad_token_id).numpy()  # (B, L)
    attention = pad_sequence([torch.ones(len(texts[i]), dtype=torch.long) for i in rows], True).numpy()  # 1: token, 0: padding
    batch = {"ids": ids, "attention": attention, "start": np.isin(ids, starts).argmax(1)}
    if rng:
        batch["masked"], chosen = mask_tokens(ids, plain, tokenizer.mask_token_id, share, rng)
    batch = {key: upload(value[rank::world], torch.device(device)) for key, value in batch.items()}
    if rng:
        batch["where"] = upload(np.flatnonzero(chosen[rank::world]), torch.device(device))
        batch |= {"tokens": max(chosen.sum(), 1) / world, "texts": len(ids) / world}
    return batch


# ------------------------------------------------------------------------------------------------ the model
def load_model(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model, any encoder, from safetensors, in fp32, with no weight missing; its tokenizer. Else fails."""
    with explain(f"cannot load model {source}", "a masked language model's folder with tokenizer can be given instead"):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForMaskedLM.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, trust_remote_code=False, return_dict=True,
            output_attentions=False)  # fmt: skip
        given, vocabulary = tokenizer("a"), len(model.get_input_embeddings().weight)
    beyond = [key for key in info["unexpected_keys"] if re.search(r"\.layers?\.\d", key)]  # of layers that config lacks
    if lost := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"], *beyond])):
        fail(f"{source} is not a masked language model with its head: no weights, or no place, for {', '.join(lost[:3])}")
    starts = {tokenizer.cls_token_id, tokenizer.bos_token_id} & {*given["input_ids"]}
    if None in (tokenizer.mask_token, tokenizer.pad_token) or not starts:
        told = ", ".join(tokenizer.all_special_tokens)
        fail(f"the tokenizer of {source} has no mask or padding token, or puts no start token before a text, but {told}")
    both_ways = not model.config.is_encoder_decoder and not getattr(model.config, "is_decoder", False)
    if not both_ways or given.keys() - {"token_type_ids"} != {"input_ids", "attention_mask"}:
        fail(f"{source} ({model.config.model_type}) is not an encoder of token ids and an attention mask, and of nothing else")
    if not 0.99 * vocabulary <= len(tokenizer) <= vocabulary:  # some models round it up; 1 %: ours
        fail(f"{source}: a tokenizer of {len(tokenizer)} tokens does not go with a vocabulary of {vocabulary}")
    fits = (getattr(model.config, "max_position_embeddings", None) or 512) - 2 * ("roberta" in model.config.model_type)
    tokenizer.model_max_length = min(tokenizer.model_max_length, fits - fits % 8)  # rounded down: others, too, leave some free
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 cuDNN plans anew for each new length, 0.1 s a step
    return model.float(), tokenizer  # fp32, whatever precision the file is in


def masked_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Vocabulary logits (M, V) at the tokens to predict alone, of any masked language model: its head (a third of the work in
    RoBERTa-base, over half in the tiny model) gets only their hidden states, by a hook between the encoder and the head."""

    def gather(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[batch["where"]][None]  # (1, M, D)
        return output

    with getattr(model, "module", model).base_model.register_forward_hook(gather):  # within DistributedDataParallel, too
        return model(input_ids=batch["masked"], attention_mask=batch["attention"]).logits[0].float()


def encode(model: PreTrainedModel, batch: dict[str, torch.Tensor], representation: str = "cls") -> torch.Tensor:
    """Final hidden states (B, D), fp32, of unmasked texts at <s> (or its counterpart), or the mean over all their tokens."""
    hidden = model.base_model(input_ids=batch["ids"], attention_mask=batch["attention"]).last_hidden_state  # (B, L, D)
    if representation == "cls":
        return hidden[torch.arange(len(hidden), device=hidden.device), batch["start"]].float()
    mask = batch["attention"][..., None]  # (B, L, 1): 1 a token, 0 padding
    return (hidden.float() * mask).sum(dim=1) / mask.sum(dim=1)


# ------------------------------------------------------------------------------------------------ looking at the model
@torch.no_grad()
def encode_all(model: PreTrainedModel, texts: list, tokenizer, autocast, representation: str = "cls") -> torch.Tensor:
    """Vectors (N, D) of all texts, in eval mode, 128 at a time, a bar above 2,000 (ours); left in training mode."""
    model.eval()
    order, n = np.argsort([len(ids) for ids in texts], kind="stable"), len(texts)  # similar lengths together: less padding
    parts = tqdm(np.split(order, range(128, n, 128)), "encode", leave=False, disable=n <= 2000)
    with autocast:
        vectors = torch.cat([encode(model, collate(texts, rows, tokenizer, model.device), representation) for rows in parts])
    model.train()
    return vectors[upload(order.argsort(), vectors.device)]  # back in the order of `texts`


def knn_accuracy(vectors: torch.Tensor, labels: np.ndarray, k: int = 20) -> float:
    """Share of samples whose class wins the vote of their k (20: ours) nearest others (cosine). vectors (N, D), labels (N,)"""
    y = torch.from_numpy(labels)  # on the CPU: MPS has no mode()
    vectors = torch.nn.functional.normalize(vectors)
    nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(min(k, len(y) - 1)).indices.cpu()  # (N, k), never itself
    return (y[nearest].mode(dim=1).values == y).float().mean().item()


@torch.no_grad()
def look(model: PreTrainedModel, texts: list[np.ndarray], tokenizer, plain, share: float, autocast) -> tuple[float, str]:
    """Share of the tokens to predict (masks always the same) that the model gets right, in eval mode; a table of 8 texts."""
    model.eval()
    batch = collate(texts, range(len(texts)), tokenizer, model.device, plain, share, np.random.default_rng(0))
    with autocast:
        top = masked_logits(model, batch).topk(3).indices.cpu()  # (M, 3)
    model.train()
    truth, row = batch["ids"].flatten()[batch["where"]].cpu(), batch["where"].cpu() // batch["ids"].shape[1]  # (M,)
    table = "|masked text|truth: the model's top 3|\n|-|-|\n"
    for b, ids in enumerate(batch["masked"][:8]):
        told = [[tokenizer.decode([k]) for k in (truth[m], *top[m])] for m in torch.where(row == b)[0]]
        cells = tokenizer.decode(ids[batch["attention"][b] == 1]), "; ".join(f"{t}: {x}, {y}, {z}" for t, x, y, z in told)
        table += "".join("|" + c.replace("\n", " ").replace("|", "&#124;").replace("<", "&lt;") for c in cells) + "|\n"
    return (top[:, 0] == truth).float().mean().nan_to_num().item(), table


# ------------------------------------------------------------------------------------------------ THE METHOD
def update(model, optimizer, scheduler, batch, autocast) -> dict[str, torch.Tensor]:
    """One step of Algorithm 2. batch: ids, masked (B, L) and what belongs to them, see collate."""
    with autocast:
        truth = batch["ids"].flatten()[batch["where"]]  # (M,)
        mlm = torch.nn.functional.cross_entropy(masked_logits(model, batch), truth, reduction="sum") / batch["tokens"]
        losses = {"losses/mlm": mlm, "losses/total": mlm}
    losses["losses/total"].backward()
    losses["charts/grad_norm"] = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return {key: value.detach() for key, value in losses.items()}


if __name__ == "__main__":
    args, state, device, autocast, rank, world = set_up(tyro.cli(Args, description=__doc__))
    model, tokenizer = load_model(args.model)
    with transformers.torch_distributed_zero_first(rank if world > 1 else -1):  # the others find the cache filled
        data, _ = load_data(
            args, TEXT_SETS, docstring_rows, lambda kind: "string" in getattr(kind, "dtype", ""),
            partial(tokenize_all, tokenizer=tokenizer, length=args.max_length), ("train",))  # fmt: skip
    texts, labels = data["train"]  # the train split alone: N of (length,); labels (N,) or None, now for the probe only
    n, lengths = len(texts), np.array([len(ids) for ids in texts])
    if 0 < n % args.batch_size < world:
        fail(f"the last batch has {n % args.batch_size} texts for {world} processes: give another --batch-size")
    ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)  # token ids
    plain = np.isin(np.arange(len(model.get_input_embeddings().weight)), list(ordinary))  # (V,), True: may be masked or put in
    model.to(device).train()
    with explain(f"{args.model} does not run on these texts", "--precision fp32 or a smaller --max-length may help"):
        look(model, [texts[lengths.argmax()]], tokenizer, plain, 1.0, autocast)  # a trial, before anything is written
    init = parameters_to_vector(model.base_model.parameters()).detach()
    start, values = state.get("step", 0), state.get("values", {})
    steps = args.epochs * -(-n // args.batch_size)  # of each round
    total_steps = steps
    run_dir = Path(args.run_dir)
    if state and state["n"] != n:
        fail(f"{args.dataset} has {n} samples for training, {state['n']} when {run_dir} began: give the same data again")
    if rank == 0:
        with explain(f"cannot write to {run_dir}", "give another --run-dir"):
            run_dir.mkdir(parents=True, exist_ok=args.resume)  # not one that began since we looked
            writer = SummaryWriter(run_dir, purge_step=start + 1 if start else 0)  # drop what came after the checkpoint
        writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()), start)
        print(f"{json.dumps(asdict(args))}\n{n:,} texts, {lengths.sum():,} tokens, {model.num_parameters():,} weights, "
              f"{device}" + " (a small run: real texts, a tiny model)" * (args.dataset == "docstrings"))  # fmt: skip

    stop = []  # a signal that came in: finish the step (several processes: go on to the next --log-every), save, leave
    for number in (signal.SIGTERM, signal.SIGINT):  # a second Ctrl-C ends at once
        signal.signal(number, lambda came, _: (stop.append(came), signal.signal(signal.SIGINT, signal.SIG_DFL),
                                               rank or os.write(2, b"\nstopping after this step\n")))  # fmt: skip
    probe = labels is not None and n > 1 and args.eval_every > 0 and rank == 0
    fixed = [texts[i] for i in np.linspace(0, n - 1, min(n, 64)).astype(int)]  # what the masked accuracy is measured on
    every = -(-n // KNN_TEXTS)  # rounded up: the probe sees texts from everywhere, since rows may be sorted by class
    seen, labels = texts[::every], (labels[::every] if probe else labels)
    if probe and start == 0:
        writer.add_scalar("eval/knn_accuracy_start", knn_accuracy(encode_all(model, seen, tokenizer, autocast), labels), 0)
    order = batches_of_epochs(args, 0, lengths)
    optimizer, scheduler = optimizer_and_schedule(model, args, steps, betas=(0.9, 0.98), eps=1e-6)  # Gururangan's
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}  # in a checkpoint: add what has to last
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    if args.compile == "on":  # layer by layer: all of a kind share a graph, and what hooks change between them stays as it is
        for layer in [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]:
            layer.compile()
    # Each process takes every world-th row of a batch. Some models have weights that no loss reaches.
    parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    clock = time.time() - state.get("seconds", 0.0)  # when it would have begun without interruption
    bar = tqdm(range(start, total_steps), SCRIPT.stem, total_steps, initial=start, dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        rng = np.random.default_rng([args.seed, 0, 1, step])  # of the masks, and of dropout: a resumed run draws the same
        torch.manual_seed(int(rng.integers(2**62)) + rank)
        batch = collate(texts, order[step], tokenizer, device, plain, args.mlm_probability, rng, rank, world)
        rate = scheduler.get_last_lr()[0]
        losses = update(parallel, optimizer, scheduler, batch, autocast)
        done = step + 1
        save = done % steps == 0 or (stop and world == 1) or (args.save_every and done % args.save_every == 0)
        if save or done % args.log_every == 0:  # apart from looks and new rounds, the only wait for the GPU
            losses["charts/distance_from_init"] = (parameters_to_vector(model.base_model.parameters()).detach() - init).norm()
            values, stopping = average(losses, done, stop, world)
            save = save or stopping
            values["charts/learning_rate"] = rate
            values["charts/samples_per_second"] = done * args.epochs * n / steps / (time.time() - clock)
            bar.set_postfix({key[7:]: f"{value:.4f}" for key, value in values.items() if key.startswith("losses/")})
            if rank == 0:
                for key, value in values.items():
                    writer.add_scalar(key, value, done)
        if rank == 0 and args.eval_every and (done % args.eval_every == 0 or done % steps == 0):
            if probe:
                accuracy = knn_accuracy(encode_all(model, seen, tokenizer, autocast), labels)
                writer.add_scalar("eval/knn_accuracy", accuracy, done)
            accuracy, table = look(model, fixed, tokenizer, plain, args.mlm_probability, autocast)
            writer.add_scalar("eval/masked_accuracy", accuracy, done)
            writer.add_text("eval/guesses", table, done)
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
    samples, parent = total_steps / steps * args.epochs * n, args.model
    write(run_dir / "model", lambda folder: [part.save_pretrained(folder) for part in (model, tokenizer)])
    git = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=SCRIPT.parent, capture_output=True, errors="ignore")
    metrics = {  # written last: where it is, the run is complete
        "args": asdict(args), "stage": SCRIPT.stem, "parent": parent, "git_commit": git.stdout.strip(), "final": values,
        "versions": {name: version(name) for name in ("torch", "torchvision", "transformers", "datasets")},
        "seconds": round(state["seconds"], 1), "samples_per_second": round(samples / state["seconds"], 1)}  # fmt: skip
    write(run_dir / "metrics.json", lambda file: file.write_text(json.dumps(metrics, indent=2) + "\n"))
    (run_dir / "resume.pt").unlink()
    print(f"wrote {run_dir}/model: further pre-trained on {n:,} texts of {args.dataset}, {state['seconds']:.0f} s. Next:")
    flags = {key: getattr(args, key) for key in ("dataset", "input_column", "label_column", "max_train_samples", "seed")}
    flags |= {key: getattr(args, key) for key in ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_ratio")}
    flags |= {"mlm_probability": args.mlm_probability, "max_length": args.max_length}
    flags |= {"model": args.model, "teacher": f"{run_dir}/model"}
    flags = [word for k, v in flags.items() if v is not None for word in (f"--{k.replace('_', '-')}", str(v))]
    print(shlex.join(["python", os.path.relpath(SCRIPT.with_name("self_distill_roberta.py")), *flags]))
