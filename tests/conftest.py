"""No network, no files outside the tests' own folder, and the scripts as a user runs them: one process each."""

import importlib.util
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# One thread, in this process as in all that it starts, for equal bits. Set here, before a test file loads torch.
os.environ["OMP_NUM_THREADS"] = "1"
TORCHRUN = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0".split()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


# By how long they take. With `--dist loadfile --no-loadscope-reorder` a short file comes last, and no core waits long.
LONGEST_FIRST = "vit roberta faults baselines distributed finetune_text datasets whole_run".split()


def pytest_collection_modifyitems(config, items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session", autouse=True)
def hub(tmp_path_factory):
    """A Hub cache of its own, and nothing behind it. Set before any script or library is imported."""
    home = tmp_path_factory.mktemp("hub")
    os.environ |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "200"}
    return home


@pytest.fixture(scope="session")
def script(hub):
    """A script as a module: its functions, without its main part."""

    def load(name):
        spec = importlib.util.spec_from_file_location(Path(name).name, ROOT / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[Path(name).name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def fork(hub):
    """start(job) -> its answer: one script in a fork of a process that has the libraries loaded, see zygote.py."""
    command = [sys.executable, str(ROOT / "tests/zygote.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    count = itertools.count()

    def start(script, argv, apart=True, **more):
        out, err = (str(hub / f"said{next(count)}") for _ in "12")
        job = {"script": str(ROOT / f"{script}.py"), "argv": [*map(str, argv)], "out": out, "err": err if apart else out}
        process.stdin.write(json.dumps(job | more) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        said = [Path(job[key]).read_text(errors="replace") for key in ("out", "err")]
        return answer["code"], answer["passed"], *said

    yield start
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="session")
def run(hub, fork):
    """Run a script to its end and return the finished process. own: in a process of its own, as a user does, which costs ten
    seconds of imports, so once or twice a script; else in a fork of one that has the libraries loaded. two: two processes."""

    def run(name, *flags, code=0, own=False, two=False, **job):
        command = [sys.executable, *(TORCHRUN if two else []), str(ROOT / f"{name}.py"), *map(str, flags)]
        if own:
            done = subprocess.run(command, capture_output=True, text=True, cwd=hub, timeout=900)
        else:
            if two:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    job["port"] = free.getsockname()[1]
            status, _, *said = fork(name, flags, cwd=str(hub), **job)
            done = subprocess.CompletedProcess(command, status, *said)
        said = f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == code, f"exit code {done.returncode}, expected {code}: {said}"
        return done

    return run


@pytest.fixture(scope="session")
def zygote(hub, fork):
    """start(script, run_dir, flags, hook) -> (exit code, moments passed, what was said), with harm at a chosen moment."""

    def start(script, run_dir, flags, hook=None, cache=None, resume=False):
        argv = ["--run-dir", str(run_dir), *["--resume"] * resume]
        argv += [x for pair in flags.items() for x in pair if x is not None]  # None: a flag without a value
        seconds = [int(path.name.split(".")[3]) for path in Path(run_dir).glob("events*")]
        while seconds and int(time.time()) <= max(seconds):  # TensorBoard orders files by second, and within one by process
            time.sleep(0.05)
        code, passed, said, _ = fork(script, argv, apart=False, hook=hook or {}, cache=cache)
        return code, passed, said.replace("\r", "\n")

    return start


def images_of(module, args, size, splits=("train", "test")):
    """load_data as the image scripts call it."""
    import datasets

    return module.load_data(
        args, module.IMAGE_SETS, lambda split: datasets.Dataset.from_generator(module.mnist5k, gen_kwargs={"split": split}),
        lambda kind: isinstance(kind, datasets.Image), lambda part, split: module.decode_all(part, split, size), splits
    )  # fmt: skip


def texts_of(module, args, tokenizer, splits=("train", "test")):
    """load_data as the text scripts call it."""
    return module.load_data(
        args, module.TEXT_SETS, module.docstring_rows, lambda kind: "string" in getattr(kind, "dtype", ""),
        lambda part, split: module.tokenize_all(part, split, tokenizer, args.max_length), splits
    )  # fmt: skip


HINTS = {  # what recurs in lines of errors
    "data": "(a folder, or a file, csv with commas, in UTF-8, can be given instead)",
    "vit": "(a folder with config, model.safetensors, preprocessor_config works)",
    "roberta": "(a masked language model's folder with tokenizer can be given instead)",
    "either": "(a ViT's or a text model's folder, with its processor or tokenizer, works)",
    "classes": "(it takes two of each class and a sample for each)",
    "columns": "is missing or not what the model reads, columns are",
    "flags": "see --input-column and --label-column",
    "labelled": "fine-tuning needs labels of at least two, in train and in test: name their column by --label-column, or sort "
                "images into a folder for each class",
}  # fmt: skip


def is_the_line(said, line, **names):
    """The whole line of an error; what stands for * in it is a library's or the system's own."""
    expected = "error: " + line.format(**names, **HINTS)
    assert re.fullmatch(".*".join(map(re.escape, expected.split("*"))), said), f"{said}\nexpected: {expected}"
