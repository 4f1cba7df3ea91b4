"""A run that is cut off at any moment goes on to the same bits; nothing that is passed in does harm or leaves half a result.

The quick part is run by default. The whole, every kill of every script, is `pytest tests/test_faults.py --slow`.
"""

import io
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, is_the_line
from PIL import Image
from safetensors.torch import load_file

VIT, ROBERTA = ROOT / "pretrained/vit-mae-tiny", ROOT / "pretrained/roberta-tiny"
QUICK = {"--log-every": 1, "--save-every": 3, "--eval-every": 4}


@pytest.fixture(scope="module")
def stages(hub, tmp_path_factory):
    """{script: flags} of a small run of each, on 24 images or texts of our own."""
    rng, base = np.random.default_rng(0), tmp_path_factory.mktemp("own")
    for name in "ab":
        (base / "photos/train" / name).mkdir(parents=True)
        (base / "photos/test" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(base / f"photos/train/{name}/{i}.png")
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(base / f"photos/test/{name}/0.png")
    (base / "texts").mkdir()
    for split, n in (("train", 24), ("test", 4)):
        texts = [" ".join(rng.choice("the a of model loss is not we this".split(), 9)) for _ in range(n)]
        rows = [{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(texts)]
        (base / f"texts/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = {"--dataset": base / "photos", "--model": VIT, "--batch-size": 4, "--steps": 8} | QUICK
    texts = {"--dataset": base / "texts", "--model": ROBERTA, "--batch-size": 4, "--epochs": 2} | QUICK
    return {
        "further_pretrain_vit": images, "self_distill_vit": images | {"--steps": 5, "--rounds": 2},
        "further_pretrain_roberta": texts, "self_distill_roberta": texts | {"--epochs": 1, "--rounds": 2},
        "finetune": images | {"--dropout": 0.1}, "finetune on texts": texts,
        "finetune by recadam": images | {"--method": "recadam"},
    }  # fmt: skip


def result(run_dir):
    """Final weights, final numbers, curves: all that an undisturbed run and a resumed one must agree on to the bit."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "per_second" not in tag]
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    final = json.loads((run_dir / "metrics.json").read_text())["final"]
    return load_file(run_dir / "model/model.safetensors"), {k: v for k, v in final.items() if "per_second" not in k}, curves


def agree(one, two):
    assert one[0].keys() == two[0].keys() and all(torch.equal(one[0][key], two[0][key]) for key in one[0])
    assert one[1] == two[1]
    assert one[2] == two[2]  # no gap in a curve, no step twice
    steps = [step for step, _ in two[2]["losses/total"]]
    assert steps == list(range(1, len(steps) + 1))


@pytest.fixture(scope="module")
def undisturbed(zygote, stages, tmp_path_factory):
    """stage -> (the moments it passes, its result), run once."""
    known = {}

    def of(stage):
        if stage not in known:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            code, passed, said = zygote(stage.split()[0], run_dir, stages[stage])
            assert code == 0, said[-2000:]
            known[stage] = passed, result(run_dir)
        return known[stage]

    return of


SCRIPTS = ["further_pretrain_vit", "self_distill_vit", "further_pretrain_roberta", "self_distill_roberta", "finetune"]
CASES = [pytest.param(name, 3) for name in (*SCRIPTS, "finetune by recadam")] + [
    pytest.param(name, 22, marks=pytest.mark.slow) for name in (*SCRIPTS, "finetune on texts", "finetune by recadam")
]


@pytest.mark.parametrize(("stage", "kills"), CASES)
def test_killed_at_any_moment_it_resumes_to_the_same_bits(zygote, stages, undisturbed, tmp_path, stage, kills):
    script, flags, (passed, whole) = stage.split()[0], stages[stage], undisturbed(stage)
    assert {"step", "half a checkpoint", "before sync", "before rename to resume.pt", "model saved"} < set(passed)
    assert {one for one, two in itertools.pairwise(passed) if two.startswith("before rename")} == {"before sync"}
    kinds = {}
    for at, name in enumerate(passed, 1):
        kinds.setdefault(name, []).append(at)
    last = "before rename to metrics.json"  # when all is trained, and nothing says so yet
    moments = {ats[-1] for name, ats in kinds.items() if kills > 10 or name == last}  # one of each kind, or the last alone
    rest = sorted(set(range(1, len(passed) + 1)) - moments)
    random.Random(stage).shuffle(rest)
    moments |= set(rest[: max(kills - len(moments), 0)])  # and others, each script its own
    assert len(moments) >= min(kills, 20)
    for at in sorted(moments):
        run_dir = tmp_path / f"killed_{at}"
        code, _, _ = zygote(script, run_dir, flags, {"kind": "kill", "at": at})
        assert code == -9
        code, _, said = zygote(script, run_dir, flags, resume=True)
        assert code == 0, (at, passed[at - 1], said[-2000:])
        agree(whole, result(run_dir))
        left = {path.name for path in run_dir.iterdir() if not path.name.startswith("events")}
        assert left <= {"model", "metrics.json", "round_0", "round_1", "round_2"}, (passed[at - 1], left)


def test_killed_twice_and_asked_to_stop_once(zygote, stages, undisturbed, tmp_path):
    flags, (passed, whole) = stages["self_distill_vit"], undisturbed("self_distill_vit")
    steps = [i for i, name in enumerate(passed, 1) if name == "step"]
    code, _, said = zygote("self_distill_vit", tmp_path / "cut", flags, {"kind": "term", "at": steps[1]})
    assert code == 1
    expected = "error: stopped by a signal at step 2, saved: go on with the same command and "
    expected += f"--run-dir {tmp_path}/cut --resume"
    assert said.splitlines()[-1] == expected
    state = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    torch.save(state | {"seconds": state["seconds"] + 1000}, tmp_path / "cut/resume.pt")
    for _ in range(2):
        code, _, _ = zygote("self_distill_vit", tmp_path / "cut", flags, {"kind": "kill", "at": 9}, resume=True)
        assert code == -9
    code, _, said = zygote("self_distill_vit", tmp_path / "cut", flags, resume=True)
    assert code == 0, said
    agree(whole, result(tmp_path / "cut"))
    assert 1000 < json.loads((tmp_path / "cut/metrics.json").read_text())["seconds"] < 1200  # of all its parts
    (tmp_path / "cut/.DS_Store").write_text("of a file browser")
    (tmp_path / "cut/resume.pt").touch()  # killed before the last line but one
    code, _, said = zygote("self_distill_vit", tmp_path / "cut", flags, resume=True)
    assert code == 0 and said.startswith(f"{tmp_path}/cut is complete: nothing to resume")
    assert not (tmp_path / "cut/resume.pt").exists()


def test_without_an_interval_a_checkpoint_is_written_at_the_end_alone(zygote, stages, tmp_path):
    flags = stages["further_pretrain_vit"] | {"--save-every": 0}
    code, passed, said = zygote("further_pretrain_vit", tmp_path / "run", flags)
    assert code == 0 and passed.count("before rename to resume.pt") == 1, said[-1000:]


def test_precision_and_the_name_of_a_run(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")  # left there by something else: without a WORLD_SIZE there is one process
    (tmp_path / "a b;c").mkdir()
    for name in SCRIPTS:
        module = script(name)
        known = module.resolve(module.Args()).run_dir
        assert re.fullmatch(rf"runs/{module.Args().dataset}__{name}__1__\d{{10}}", known)
        assert module.resolve(module.Args(dataset="./a b;c", seed=7)).run_dir.startswith(f"runs/a-b-c__{name}__7__")
    for precision, kind in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        args = module.Args(precision=precision, device="cpu", debug=True, run_dir=str(tmp_path / precision))
        _, _, _, autocast, rank, world = module.set_up(args)
        assert (rank, world) == (0, 1)
        with autocast:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == (precision != "fp32")
    args = module.resolve(module.Args(run_dir=str(tmp_path / "fused")))
    assert module.optimizer_and_schedule(torch.nn.Linear(2, 2), args, 9, (0.9, 0.95))[0].defaults["fused"]


READY = ["further_pretrain_vit", *(pytest.param(stage, marks=pytest.mark.slow) for stage in SCRIPTS[1:])]


@pytest.mark.parametrize("stage", READY)
def test_killed_while_the_data_is_made_ready(zygote, stages, undisturbed, tmp_path, stage):
    script, flags, cache = stage.split()[0], stages[stage], str(tmp_path / "cache")
    hook = {"kind": "kill", "at": 1} if "roberta" in stage else {"kind": "kill", "at": 7, "decode": True}
    code, _, _ = zygote(script, tmp_path / "cut", flags, hook, cache)
    assert code == -9
    code, _, said = zygote(script, tmp_path / "cut", flags, cache=cache, resume=True)
    assert code == 0 and "has no checkpoint yet: from the start" in said, said[-1000:]
    agree(undisturbed(stage)[1], result(tmp_path / "cut"))


def test_a_second_ctrl_c_ends_a_run_at_once_and_it_resumes(zygote, stages, undisturbed, tmp_path):
    stage = "further_pretrain_vit"
    at = [i for i, name in enumerate(undisturbed(stage)[0], 1) if name == "step"][4]  # the first checkpoint is at the third
    code, _, said = zygote(stage, tmp_path / "run", stages[stage], {"kind": "twice", "at": at})
    assert code == -2 and "stopping after this step" in said and "error" not in said
    code, _, said = zygote(stage, tmp_path / "run", stages[stage], resume=True)
    assert code == 0, said[-1500:]
    agree(undisturbed(stage)[1], result(tmp_path / "run"))


def test_ctrl_c_while_images_are_decoded_is_one_line(zygote, tmp_path):
    hook = {"kind": "interrupt", "at": 7, "decode": True}  # in each of the processes that decode
    code, _, said = zygote("further_pretrain_vit", tmp_path / "run", {"--steps": 2}, hook, str(tmp_path / "cache"))
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert code == 1 and errors == ["error: interrupted"] and "Traceback" not in said, said[-1500:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_images_are_decoded_leaves_no_process_behind(zygote, tmp_path, number):
    """Those that decode wait for work, and would for ever, when the one that gives it is gone."""
    if not shutil.which("ps"):
        pytest.skip("no ps to look for processes with")
    hook = {"kind": "interrupt one", "at": 7, "decode": True, "signal": int(number)}
    code, _, said = zygote("further_pretrain_vit", tmp_path / "run", {"--steps": 2}, hook, str(tmp_path / "cache"))
    assert code == 1 and "error: interrupted" in said and "Traceback" not in said, said[-1500:]
    group = re.search(r"group (\d+)", said)[1]
    for _ in range(100):
        listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout.splitlines()
        if not (left := [line for line in listed if line.split()[0] == group and "Z" not in line]):
            break
        time.sleep(0.1)
    assert not left
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_finetune_looks_at_the_model_is_one_line(monkeypatch, capfd):
    """It looks at the model before set_up, which sees to signals in the other scripts."""
    monkeypatch.setattr("sys.argv", ["finetune.py"])
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr("os._exit", sys.exit)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        runpy.run_path(str(ROOT / "finetune.py"), run_name="__main__")
    signal.signal(signal.SIGINT, before)
    assert end.type is SystemExit and end.value.code == 1 and capfd.readouterr().err == "\nerror: interrupted\n"


# ------------------------------------------------------------------------------------------------ faults under way
FAULTS = {
    "disk full": ("full", "error: "),
    "directory gone": ("delete", "error: FileNotFoundError: "),
    "out of memory": ("memory", "error: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total "
                      "capacity of ... (out of memory: try a smaller --batch-size; disk full: make room, --resume; --debug "
                      "shows where)"),
    "not finite": ("nan", "error: loss or weights not finite by step 5: the last checkpoint is kept, "),
}  # fmt: skip


@pytest.mark.parametrize("stage", ["further_pretrain_vit", "self_distill_roberta", "finetune"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_line_and_keeps_the_last_checkpoint(zygote, stages, undisturbed, tmp_path, fault, stage):
    kind, line = FAULTS[fault]
    flags, (passed, whole) = stages[stage], undisturbed(stage)
    at = [i for i, name in enumerate(passed, 1) if name == "step"][4]  # the fifth: the first checkpoint is at the third
    code, _, said = zygote(stage, tmp_path / "run", flags, {"kind": kind, "at": at})
    errors = [text for text in said.splitlines() if "error" in text.lower()]
    assert code == 1 and "Traceback" not in said
    assert errors and errors[-1].startswith(line), said[-1500:]
    assert kind != "full" or "File too large" in errors[-1]
    if kind == "delete":
        assert not (tmp_path / "run").exists()
        return
    assert not (tmp_path / "run/metrics.json").exists() and not list((tmp_path / "run").glob("*.tmp"))
    assert torch.load(tmp_path / "run/resume.pt", weights_only=True)["step"] == 3
    code, _, said = zygote(stage, tmp_path / "run", flags, resume=True)
    assert code == 0, said[-1500:]
    agree(whole, result(tmp_path / "run"))


def test_a_truncated_checkpoint_is_named_and_not_half_loaded(zygote, stages, tmp_path):
    flags, run_dir = stages["further_pretrain_vit"], tmp_path / "run"
    zygote("further_pretrain_vit", run_dir, flags, {"kind": "kill", "at": 9})
    whole = (run_dir / "resume.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04cposix\nsystem\n"):  # the last: a pickle that would run a command
        (run_dir / "resume.pt").write_bytes(content)
        code, _, said = zygote("further_pretrain_vit", run_dir, flags, resume=True)
        assert code == 2 and said.splitlines()[-1].startswith(f"error: {run_dir}/resume.pt is not a whole checkpoint: ")
        assert (run_dir / "resume.pt").read_bytes() == content and not (run_dir / "model").exists()


def test_other_arguments_are_named_and_refused_but_for_harmless_ones(zygote, stages, tmp_path):
    flags, run_dir = stages["further_pretrain_roberta"], tmp_path / "run"
    zygote("further_pretrain_roberta", run_dir, flags, {"kind": "kill", "at": 9})
    code, _, said = zygote("further_pretrain_roberta", run_dir, flags | {"--learning-rate": 0.5}, resume=True)
    assert code == 2
    assert said.splitlines()[-1] == "error: this run began with --learning-rate 0.0001, not 0.5: give the same again"
    code, _, said = zygote("further_pretrain_roberta", run_dir, flags | {"--log-every": 2, "--save-every": 5}, resume=True)
    assert code == 0, said


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_but_the_harmless_ones_is_compared(script, name, capsys):
    harmless = {"run_dir", "resume", "device", "compile", "debug", "save_every", "eval_every", "log_every"}  # change no weight
    module = script(name)
    args = module.Args()
    began = {"stage": name, "args": vars(args)}
    for key, value in vars(args).items():
        other = module.replace(args, **{key: not value if isinstance(value, bool) else f"{value}1"})
        if key in harmless:
            module.refuse_another(began, other)
            continue
        with pytest.raises(SystemExit):
            module.refuse_another(began, other)
        assert f"this run began with --{key.replace('_', '-')} {value}, not " in capsys.readouterr().err


def test_what_is_not_this_run_is_neither_resumed_nor_touched(zygote, stages, tmp_path):
    """Another script's run, a folder of something else, one with a model of the user's, other data than it began with."""
    further, distill = stages["further_pretrain_vit"], stages["self_distill_vit"]
    zygote("self_distill_vit", tmp_path / "cut", distill, {"kind": "kill", "at": 9})
    assert (tmp_path / "cut/resume.pt").exists()
    zygote("further_pretrain_vit", tmp_path / "whole", further)
    (tmp_path / "foreign").mkdir()
    for name in ("metrics.json", "resume.pt", "notes.txt"):
        (tmp_path / "foreign" / name).write_text("{}")
    shutil.copytree(VIT, tmp_path / "project/model")
    for script, folder, flags, line in (
        ("further_pretrain_vit", "cut", further, "{p} is a run of self_distill_vit, not of further_pretrain_vit"),
        ("finetune", "whole", stages["finetune"], "{p} is a run of further_pretrain_vit, not of finetune: give another"),
        ("further_pretrain_vit", "whole", further | {"--steps": 9}, "this run began with --steps 8, not 9"),
        ("further_pretrain_vit", "foreign", further, "--run-dir {p} is not a run of this script: give the"),
        ("further_pretrain_vit", "project", further | {"--model": tmp_path / "project/model"}, "--run-dir {p} is not a"),
    ):
        before = {path: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()}
        code, _, said = zygote(script, tmp_path / folder, flags, resume=True)
        assert code == 2 and said.splitlines()[-1].startswith("error: " + line.format(p=tmp_path / folder)), said[-1000:]
        assert {path: path.read_bytes() for path in (tmp_path / folder).rglob("*") if path.is_file()} == before
    for content in ("", "[]", "{"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd/metrics.json").write_text(content)
        code, _, said = zygote("further_pretrain_vit", tmp_path / "odd", further, resume=True)
        is_the_line(said.splitlines()[-1], "{p}/odd/metrics.json is not that of a run: * (give another --run-dir)", p=tmp_path)
        assert code == 2 and (tmp_path / "odd/metrics.json").read_text() == content
    rows = [json.dumps({"text": f"word {i}"}) for i in range(24)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    flags = stages["further_pretrain_roberta"] | {"--dataset": tmp_path / "own.jsonl"}
    zygote("further_pretrain_roberta", tmp_path / "texts", flags, {"kind": "kill", "at": 9})
    (tmp_path / "own.jsonl").write_text("\n".join(rows[:20]))
    code, _, said = zygote("further_pretrain_roberta", tmp_path / "texts", flags, resume=True)
    assert code == 2 and "own.jsonl has 20 samples for training, 24 when " in said.splitlines()[-1], said[-1000:]


def test_what_nobody_foresaw_is_one_line_too(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for name in SCRIPTS:
        module = script(name)
        module.set_up(module.Args(device="cpu", run_dir=str(tmp_path / "run")))
        with pytest.raises(SystemExit) as end:
            sys.excepthook(OSError, OSError(28, "No space left on device"), None)
        assert end.value.code == 1 and capsys.readouterr().err == (
            "error: OSError: [Errno 28] No space left on device (out of memory: try a smaller --batch-size; disk full: make "
            "room, --resume; --debug shows where)\n")  # fmt: skip


def test_a_full_stdout_does_not_hide_the_line(script, monkeypatch, capsys):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    module = script("further_pretrain_vit")
    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(SystemExit):
        module.fail("the reason")
    assert capsys.readouterr().err == "error: the reason\n"


def test_a_librarys_line_that_announces_the_next_is_said_with_it(script, capsys):
    module = script("further_pretrain_vit")
    for error, line in (("Not one of:\nthis\nor that", "Not one of: this"), ("Not this\nnor that", "Not this ")):
        with pytest.raises(SystemExit), module.explain("cannot load", "hint"):
            raise ValueError(error)
        assert capsys.readouterr().err == f"error: cannot load: {line.strip()} (hint)\n"


def test_a_name_of_a_run_that_is_too_long_is_refused(run, tmp_path):
    said = run("further_pretrain_vit", "--run-dir", tmp_path / ("x" * 300), code=2).stderr
    line = rf"error: cannot write to {tmp_path}/x+: \[Errno 36\] .* \(give another --run-dir\)"
    assert re.fullmatch(line, said.splitlines()[-1]), said


def test_letters_that_the_terminal_lacks_and_another_path_of_the_script(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "link").symlink_to(ROOT)
    flags = ("--run-dir", tmp_path / "бег", "--steps", 1, "--batch-size", 8, "--max-train-samples", 16, "--eval-every", 0)
    assert f"wrote {tmp_path}/\\u0431\\u0435\\u0433/model" in run("further_pretrain_vit", *flags, own=True).stdout
    monkeypatch.setattr("conftest.ROOT", tmp_path / "link")
    assert "is complete: nothing to resume" in run("further_pretrain_vit", *flags, "--resume", own=True).stdout


def test_debug_shows_the_traceback(run, zygote, tmp_path):
    code, _, said = zygote("further_pretrain_vit", tmp_path / "run", {"--dataset": tmp_path})
    assert code == 2 and "Traceback" not in said
    flags = ("--dataset", tmp_path, "--run-dir", tmp_path / "run", "--debug")
    assert "Traceback (most recent call last)" in run("further_pretrain_vit", *flags, code=1).stderr


# ------------------------------------------------------------------------------------------------ hostile and mistaken input
def bomb(path):
    """A PNG of a few kilobytes that says it is 60,000 by 60,000 pixels."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path.mkdir()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (path / "bomb.png").write_bytes(png)
    return path


def pickled(path):
    """A model folder whose weights are a pickle."""
    path.mkdir()
    (path / "config.json").write_text((VIT / "config.json").read_text())
    (path / "preprocessor_config.json").write_text((VIT / "preprocessor_config.json").read_text())
    torch.save({"x": torch.zeros(1)}, path / "pytorch_model.bin")
    return path


def with_code(path):
    """A model that wants to run code of its own."""
    path.mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForMaskedLM": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit('code of a download was run')")
    return path


def with_mapped_code(path):
    """A RoBERTa that asks for model and tokenizer classes of its own: they are left aside, the library's are used."""
    shutil.copytree(ROBERTA, path)
    for name, kinds in (("config.json", ("AutoModelForMaskedLM",)), ("tokenizer_config.json", ("AutoTokenizer",))):
        values = json.loads((path / name).read_text())
        values["auto_map"] = {kind: ["evil.Evil", "evil.Evil"] if kind == "AutoTokenizer" else "evil.Evil" for kind in kinds}
        (path / name).write_text(json.dumps(values))
    (path / "evil.py").write_text("raise SystemExit('code of a download was run')")
    return path


def test_code_that_a_known_model_brings_is_not_run(zygote, stages, tmp_path):
    flags = stages["further_pretrain_roberta"] | {"--model": with_mapped_code(tmp_path / "m"), "--epochs": 1}
    code, _, said = zygote("further_pretrain_roberta", tmp_path / "run", flags)
    assert code == 0 and "code of a download" not in said, said[-1000:]


def test_code_of_the_hub_that_a_configuration_asks_for_is_not_run(script, tmp_path, monkeypatch, capsys):
    """transformers fetches and runs an attention of the Hub, if the package kernels is there: here, what it would call."""
    from transformers.integrations import hub_kernels

    assert callable(hub_kernels.get_kernel)  # what load_and_register_attn_kernel calls, in all versions that are admitted
    for name in SCRIPTS:
        monkeypatch.setattr(hub_kernels, "get_kernel", print)
        module = script(name)
        module.set_up(module.Args(device="cpu", debug=True, run_dir=str(tmp_path / "run")))
        with pytest.raises(SystemExit) as end:
            hub_kernels.get_kernel("evil/kernel", revision=None)
        assert end.value.code == 2 and capsys.readouterr().err == "error: config.json asks for code: evil/kernel\n"


SWITCHED = {"output_attentions": True, "return_dict": False, "gradient_checkpointing": True}


@pytest.mark.parametrize("stage", ["self_distill_vit", "self_distill_roberta", "finetune", "finetune on texts"])
def test_what_a_configuration_switches_on_does_not_end_a_run(zygote, stages, tmp_path, stage):
    """Attentions are not saved with a model: the end of a run was lost. A checkpointed layer does not bear another mask."""
    few = {key: 1 for key in ("--steps", "--epochs", "--rounds") if key in stages[stage]} | {"--max-train-samples": 8}
    values = SWITCHED if stage == "self_distill_vit" else {"output_attentions": True}
    model = changed(stages[stage]["--model"], tmp_path / "m", **values)
    code, _, said = zygote(stage.split(" on ")[0], tmp_path / "run", stages[stage] | few | {"--model": model})
    assert code == 0 and (tmp_path / "run/model/model.safetensors").exists(), said[-1500:]


def csv(path, text):
    path.write_text(text)
    return path


def photos(path, n=4, name="a"):
    for label in (name, "b"):
        (path / label).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(np.full((9, 9, 3), i, np.uint8)).save(path / label / f"{i}.png")
    return path


def lacking(path):
    """Images of a class in test alone, which the library counts among the classes all the same."""
    photos(path / "train")
    photos(path / "test", name="z")
    return path


def hidden(path):
    """A test split without labels, as the Hub marks it: class -1."""
    import datasets

    path.mkdir()
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["x", "y"]))
    for split, labels in (("train", [0, 1] * 5), ("test", [-1] * 4)):
        rows = {"text": [f"word {i}" for i in range(len(labels))], "label": labels}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f"{split}.parquet")
    return path


def changed(source, path, **values):
    """A copy of a model folder with other values in its configuration."""
    shutil.copytree(source, path)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | values))
    return path


def pixels(path, **values):
    """A copy of the tiny ViT with other values in its image processor."""
    shutil.copytree(VIT, path)
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return path


def zipped(path, name="all.zip"):
    """Images in folders of classes, and the same images packed beside them, under any name."""
    photos(path)
    with zipfile.ZipFile(path / name, "w") as archive:
        for file in path.glob("*/*.png"):
            archive.write(file, file.relative_to(path))
    return path


def indexed(source, path):
    """A model whose index says that the weights are in a pickle."""
    shutil.copytree(source, path)
    weights = load_file(path / "model.safetensors")
    torch.save(weights, path / "x.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "x.bin")}
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def empty(path):
    path.mkdir()
    return path


def floats(path):
    path.mkdir()
    Image.fromarray(np.random.default_rng(0).random((20, 20), np.float32)).save(path / "a.tiff")
    return path


def bare(folder):
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROBERTA / name, folder)
    return folder


def unmasked(folder):
    shutil.copytree(ROBERTA, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids"]}))
    return folder


def cropped(path):
    return changed(ROBERTA, path, vocab_size=90)


def grey(path):
    return changed(VIT, path, num_channels=1)


V, R, F = "self_distill_vit", "self_distill_roberta", "finetune"
LOW = {"--steps": 1, "--batch-size": 1, "--rounds": 1, "--log-every": 1, "--max-train-samples": 1}
BAD = {  # script, flags, the whole line after "error: "; what stands for * is a library's
    **{f"{flag} {low - 1}": (V, lambda p, f=flag, n=low - 1: {f: n}, f"{flag} is {low - 1}, it must be at least {low} and "
       "at most 1000000000")
       for flag, low in LOW.items()},
    "epochs": (R, lambda p: {"--epochs": 0}, "--epochs is 0, it must be at least 1 and at most 1000000000"),
    "max length": (R, lambda p: {"--max-length": 0}, "--max-length is 0, it must be at least 3 and at most 1000000000"),
    "negative rate": (V, lambda p: {"--learning-rate": -0.1}, "--learning-rate is -0.1, it must be at least 0 and at most 1"),
    "rate of 2": (R, lambda p: {"--learning-rate": 2.0}, "--learning-rate is 2.0, it must be at least 0 and at most 1"),
    "nan rate": (F, lambda p: {"--learning-rate": "nan"}, "--learning-rate is nan, it must be at least 0 and at most 1"),
    "warm-up": (F, lambda p: {"--warmup-ratio": 1.5}, "--warmup-ratio is 1.5, it must be at least 0 and at most 1"),
    "mask all": (V, lambda p: {"--mask-ratio": 1.0}, "--mask-ratio is 1.0, it must be at least 0.01 and at most 0.99"),
    "mask none": (V, lambda p: {"--mask-ratio": 0.0}, "--mask-ratio is 0.0, it must be at least 0.01 and at most 0.99"),
    "tokens": (R, lambda p: {"--mlm-probability": 7.0}, "--mlm-probability is 7.0, it must be at least 0.01 and at most 1"),
    "dropout": (F, lambda p: {"--dropout": 1.0}, "--dropout is 1.0, it must be at least 0 and at most 0.99"),
    "seed": (V, lambda p: {"--seed": -1}, "--seed is -1, it must be at least 0 and at most 4294967295"),
    "save every": (V, lambda p: {"--save-every": -1}, "--save-every is -1, it must be at least 0 and at most 1000000000"),
    "nothing to learn": (R, lambda p: {"--reconstruction-coef": 0, "--distill-coef": 0},
                         "--reconstruction-coef and --distill-coef are both 0: there is nothing to learn from"),
    "bomb": (V, lambda p: {"--dataset": bomb(p / "d")},
             "cannot load {p}/d: cannot decode image {p}/d/bomb.png (row 0): Image size (3600000000 pixels) exceeds "
             "limit* (mend or remove it)"),
    "pickle": (V, lambda p: {"--model": pickled(p / "m")}, "cannot load model {p}/m: * {vit}"),
    "code, images": (V, lambda p: {"--model": with_code(p / "m")}, "cannot load model {p}/m: * {vit}"),
    "code, texts": (R, lambda p: {"--model": with_code(p / "m")}, "cannot load model {p}/m: * {roberta}"),
    "code, fine-tuning": (F, lambda p: {"--model": with_code(p / "m")}, "cannot load model {p}/m: * {either}"),
    "no columns": (R, lambda p: {"--dataset": csv(p / "d.csv", "")}, "cannot load {p}/d.csv: * {data}"),
    "ragged csv": (R, lambda p: {"--dataset": csv(p / "d.csv", "text,n\na,1\nb,2,3\n")},
                   "cannot load {p}/d.csv: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3* {data}"),
    "texts by default": (F, lambda p: {"--dataset": csv(p / "d.csv", "text,label\na,x\n")},
                         "cannot load model FacebookAI/* {either}"),
    "which column": (R, lambda p: {"--dataset": csv(p / "d.csv", "a,b\nx,y\n")},
                     "{p}/d.csv: the input or label column (None, None) {columns} a, b: {flags}"),
    "no such column": (R, lambda p: {"--dataset": csv(p / "d.csv", "text\nx\n"), "--input-column": "body"},
                       "{p}/d.csv: the input or label column (body, None) {columns} text: {flags}"),
    "no such label": (R, lambda p: {"--dataset": csv(p / "d.csv", "text\nx\n"), "--label-column": "y"},
                      "{p}/d.csv: the input or label column (text, y) {columns} text: {flags}"),
    "numbers for texts": (R, lambda p: {"--dataset": csv(p / "d.csv", "text\n1\n2\n")},
                          "{p}/d.csv: the input or label column (None, None) {columns} text: {flags}"),
    "texts for images": (V, lambda p: {"--dataset": csv(p / "d.csv", "text\nx\n")},
                         "{p}/d.csv: the input or label column (None, None) {columns} text: {flags}"),
    "semicolons": (R, lambda p: {"--dataset": csv(p / "d.csv", "text;label\na;x\n")},
                   "{p}/d.csv: the input or label column (text;label, None) {columns} text;label: {flags}"),
    "odd ending": (R, lambda p: {"--dataset": csv(p / "d.xyz", "text")},
                   "cannot load {p}/d.xyz: there is nothing that ends in .parquet, .arrow, .jpg, .jpeg, .png, .webp, "
                   ".bmp, .gif, .tif, .tiff, .ppm, .csv, .jsonl, .json, .txt {data}"),
    "a pickle": (R, lambda p: {"--dataset": csv(p / "d.pandas", "x")},
                 "cannot load {p}/d.pandas: there is nothing that ends in .parquet, .arrow, .jpg, .jpeg, .png, .webp, "
                 ".bmp, .gif, .tif, .tiff, .ppm, .csv, .jsonl, .json, .txt {data}"),
    "broken json": (R, lambda p: {"--dataset": csv(p / "d.jsonl", '{"text": ')}, "cannot load {p}/d.jsonl: * {data}"),
    "not parquet": (V, lambda p: {"--dataset": csv(p / "d.parquet", "PAR1")}, "cannot load {p}/d.parquet: * {data}"),
    "one sample of a class": (F, lambda p: {"--dataset": photos(p / "d", 1), "--model": VIT},
                              "the samples cannot be split by class: * {classes}"),
    "more samples than classes": (F, lambda p: {"--max-train-samples": 3},
                                  "the samples cannot be split by class: * {classes}"),
    "terminal escape in a name": (V, lambda p: {"--dataset": "\x1b[31mred\x07"},
                                  "unknown dataset [31mred : give mnist5k, aircraft, cub, chest_xray, dtd, dogs, flowers, "
                                  "cifar100, a folder, a file, or a Hub id (owner/name)"),
    "run directory in a file": (V, lambda p: {"--run-dir": csv(p / "f", "x") / "run"},
                                "cannot write to {p}/f/run: * (give another --run-dir)"),
    "run directory is a file": (V, lambda p: {"--run-dir": csv(p / "f", "x")},
                                "{p}/f exists: go on with it by --resume, or give another --run-dir"),
    "validation alone": (V, lambda p: {"--dataset": photos(p / "d/val").parent},
                         "{p}/d has no train split, only validation: name its folder or file train"),
    "no split to train on": (V, lambda p: {"--dataset": photos(p / "d/test").parent},
                             "{p}/d has no train split, only test: name its folder or file train"),
    "tabs": (R, lambda p: {"--dataset": csv(p / "d.csv", "text\tlabel\na\tx\n")},
             "{p}/d.csv: the input or label column (text label, None) {columns} text label: {flags}"),
    "mirrored texts": (F, lambda p: {"--dataset": csv(p / "d.csv", "text\na\n"), "--model": ROBERTA, "--flip": "True"},
                       "--flip is for images, but {ROBERTA} reads texts"),
    "no loss": (V, lambda p: {"--reconstruction-coef": 0, "--distill-coef": 0},
                "--reconstruction-coef and --distill-coef are both 0: there is nothing to learn from"),
    "no such folder": (V, lambda p: {"--dataset": p / "none"},
                       "unknown dataset {p}/none: give mnist5k, aircraft, cub, chest_xray, dtd, dogs, flowers, cifar100, "
                       "a folder, a file, or a Hub id (owner/name)"),
    "no such folder at home": (V, lambda p: {"--dataset": "~/nosuch"}, "unknown dataset ~/nosuch: give mnist5k, *"),
    "floating-point pixels": (V, lambda p: {"--dataset": floats(p / "d")},
                              "cannot load {p}/d: cannot decode image {p}/d/a.tiff (row 0): its pixels are neither of 8 "
                              "bits nor of 16, save it with 8 (mend or remove it)"),
    "no teacher there": (V, lambda p: {"--teacher": p / "none"}, "cannot load model {p}/none: * {vit}"),
    "teacher of the other kind": (R, lambda p: {"--teacher": VIT}, "cannot load model {VIT}: * {roberta}"),
    "texts model for images": (V, lambda p: {"--model": ROBERTA},
                               "{ROBERTA} is a roberta model: a vit_mae one, encoder and decoder, is needed"),
    "images model for texts": (R, lambda p: {"--model": VIT}, "cannot load model {VIT}: * {roberta}"),
    "digits for a text model": (F, lambda p: {"--model": ROBERTA},
                                "{ROBERTA}, a roberta model, is taken to read texts (vit_mae and vit read images): "
                                "mnist5k has none"),
    "device": (R, lambda p: {"--device": "cuda:99"},
               "--device cuda:99 is not to be had here: * (auto takes CUDA where there is one, else the CPU)"),
    "overshoot": (F, lambda p: {"--method": "recadam", "--recadam-strength": 1e4},
                  "--recadam-strength 10000.0 times --learning-rate 0.0005 is over 1: lower one"),
    "unlabelled": (F, lambda p: {"--dataset": csv(p / "d.csv", "text\nx\ny\n"), "--model": ROBERTA},
                   "{p}/d.csv has 0 classes: {labelled}"),
    "a label is missing": (F, lambda p: {"--dataset": csv(p / "d.csv", "text,label\na,x\nb,y\nc,\n" * 9), "--model": ROBERTA},
                           "{p}/d.csv has 0 classes: {labelled}"),
    "hidden test labels": (F, lambda p: {"--dataset": hidden(p / "d"), "--model": ROBERTA}, "{p}/d has 2 classes: {labelled}"),
    "a class that train lacks": (F, lambda p: {"--dataset": lacking(p / "d"), "--model": VIT},
                                 "{p}/d: test has labels that train lacks: ['z']: each class of a test needs samples in "
                                 "train"),
    "one class": (F, lambda p: {"--dataset": csv(p / "d.csv", "text,label\n" + "a b,x\n" * 30), "--model": ROBERTA},
                  "{p}/d.csv has 1 classes: {labelled}"),
    "texts in json by default": (F, lambda p: {"--dataset": csv(p / "d.jsonl", '{"text": "a", "label": "x"}')},
                                 "cannot load model FacebookAI/* {either}"),
    "texts in a folder like a pattern": (F, lambda p: {"--dataset": csv(empty(p / "d [1]") / "d.csv", "text\na\n").parent},
                                         "cannot load model FacebookAI/* {either}"),
    "a folder of texts by default": (F, lambda p: {"--dataset": csv(p / "train.csv", "text,label\na,x\n").parent},
                                     "cannot load model FacebookAI/* {either}"),
    "name too long": (V, lambda p: {"--dataset": "x" * 300}, "unknown dataset x*"),
    "steps for texts": (F, lambda p: {"--dataset": "docstrings", "--steps": 9},
                        "--steps is for images, but {ROBERTA} reads texts"),
    "epochs for images": (F, lambda p: {"--epochs": 9}, "--epochs is for texts, but {VIT} reads images"),
    "tokenizer of another model": (F, lambda p: {"--dataset": "docstrings", "--model": cropped(p / "m")},
                                   "{p}/m: a tokenizer of 8192 tokens (padding: <pad>) does not go with a vocabulary of "
                                   "90, or cannot pad"),
    "no tokenizer": (F, lambda p: {"--dataset": "docstrings", "--model": bare(p / "m")}, "*{p}/m: *"),  # by version
    "a tokenizer without a mask of padding": (F, lambda p: {"--dataset": "docstrings", "--model": unmasked(p / "m")},
                                              "{p}/m (roberta) is a decoder, or does not read token ids and an attention mask "
                                              "alone"),
    "a decoder": (R, lambda p: {"--model": changed(ROBERTA, p / "m", is_decoder=True)},
                  "{p}/m (roberta) is not an encoder of token ids and an attention mask, and of nothing else"),
    "a decoder, fine-tuning": (F, lambda p: {"--dataset": "docstrings",
                                             "--model": changed(ROBERTA, p / "m", is_decoder=True)},
                               "{p}/m (roberta) is a decoder, or does not read token ids and an attention mask alone"),
    "a layer too many": (R, lambda p: {"--model": changed(ROBERTA, p / "m", num_hidden_layers=3)},
                         "{p}/m is not a masked language model with its head: no weights, or no place, for "
                         "roberta.encoder.layer.3.*"),
    "a layer too many, images": (V, lambda p: {"--model": changed(VIT, p / "m", num_hidden_layers=3)},
                                 "the weights of {p}/m do not fit a ViT-MAE with decoder: *unexpected_keys*"),
    "a layer too many, fine-tuning": (F, lambda p: {"--model": changed(VIT, p / "m", num_hidden_layers=3)},
                                      "the weights of {p}/m do not fit a * of its configuration: *.3.*"),
    "pickles by an index, images": (V, lambda p: {"--model": indexed(VIT, p / "m")},
                                    "weights not in safetensors: convert them"),
    "pickles by an index, texts": (R, lambda p: {"--model": indexed(ROBERTA, p / "m")},
                                   "weights not in safetensors: convert them"),
    "pickles by an index, fine-tuning": (F, lambda p: {"--model": indexed(VIT, p / "m")},
                                         "weights not in safetensors: convert them"),
    "deviation of 0": (V, lambda p: {"--model": pixels(p / "m", image_std=[0.5, 0, 0.5])},
                       "{p}/m: its deviation of pixels is *0.5, 0, 0.5*: three numbers above 0 are needed"),
    "deviation of 0, fine-tuning": (F, lambda p: {"--model": pixels(p / "m", image_std=[0.5, 0, 0.5])},
                                    "{p}/m: its deviation of pixels is *0.5, 0, 0.5*: three numbers above 0 are needed"),
    "mean of one number": (V, lambda p: {"--model": pixels(p / "m", image_mean=[0.5])}, "cannot load model {p}/m: * {vit}"),
    "an empty variable": (V, lambda p: {"--teacher": ""},
                          "--teacher is empty: leave it out, or see to the variable that it was to come from"),
    "a zip among images": (V, lambda p: {"--dataset": zipped(p / "d")},
                           "cannot load {p}/d: all.zip lies among its images and would be unpacked and read, too: move it "
                           "{data}"),
    "a zip by another name": (F, lambda p: {"--dataset": zipped(p / "d", "notes.docx"), "--model": VIT},
                              "cannot load {p}/d: notes.docx lies among its images and would be unpacked and read, too: move "
                              "it {data}"),
    "grey model": (V, lambda p: {"--model": grey(p / "m")}, "{p}/m reads images of 1 channels: 3 are needed, RGB"),
    "grey model, fine-tuning": (F, lambda p: {"--model": grey(p / "m")},
                                "{p}/m reads images of 1 channels: 3 are needed, RGB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_with_exit_code_2_and_leaves_nothing(zygote, tmp_path, case):
    script, make, line = BAD[case]
    model = {V: {"--model": VIT}, R: {"--model": ROBERTA}, F: {}}[script]
    flags = model | make(tmp_path)
    run_dir = flags.pop("--run-dir", tmp_path / "run")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    code, _, said = zygote(script, run_dir, flags)
    errors = [text for text in said.splitlines() if text.startswith("error: ")]
    assert code == 2 and len(errors) == 1, said[-1500:]
    is_the_line(errors[0], line, p=tmp_path, VIT=VIT, ROBERTA=ROBERTA)
    assert said.rstrip().splitlines()[-1] == errors[0] and "Traceback" not in said and "\x1b" not in errors[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_names_from_data_become_neither_paths_nor_terminal_escapes(zygote, tmp_path):
    rows = [{"text": f"word {i}", "label": ["../../escape", "\x1b[2J", "a|b\n# c"][i % 3]} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"--dataset": tmp_path / "d.jsonl", "--model": ROBERTA, "--epochs": 1, "--eval-every": 1}
    for script in ("further_pretrain_roberta", "finetune"):
        code, _, said = zygote(script, tmp_path / script, flags)
        assert code == 0 and "\x1b[2J" not in said, said[-1500:]
    names = json.loads((tmp_path / "finetune/model/config.json").read_text())["id2label"].values()
    assert set(names) == {"../../escape", "\x1b[2J", "a|b\n# c"}
    assert {path.name for path in tmp_path.iterdir()} == {"d.jsonl", "further_pretrain_roberta", "finetune"}


def test_a_line_of_100_megabytes_is_cut_and_not_tokenized(zygote, tmp_path):
    with open(tmp_path / "d.txt", "w") as file:
        file.write("word " * 20_000_000 + "\n" + "another line\n" * 20)
    flags = {"--dataset": tmp_path / "d.txt", "--model": ROBERTA, "--epochs": 1}
    code, _, said = zygote("further_pretrain_roberta", tmp_path / "run", flags)
    assert code == 0 and "21 texts, 228 tokens" in said  # 128 and 20 times 5


# ------------------------------------------------------------------------------------------------ any combination of arguments
def combinations():
    from hypothesis import strategies as st

    number = st.one_of(st.sampled_from([0.0, 1e-4, 0.5, 1.0, -1.0, 2.0, float("inf"), float("nan")]), st.floats(0, 1))
    count = st.integers(-1, 4)
    shared = {
        "--seed": st.integers(-1, 2**40), "--batch-size": count, "--learning-rate": number, "--weight-decay": number,
        "--warmup-ratio": number, "--save-every": count, "--eval-every": count, "--log-every": count,
        "--max-train-samples": st.integers(-1, 30), "--precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        "--device": st.sampled_from(["auto", "cpu", "cuda", "toaster"]),
        "--compile": st.sampled_from(["auto", "off", "maybe"]), "--resume": st.none(),
        "--input-column": st.sampled_from(["image", "text", "label"]), "--label-column": st.sampled_from(["label", "none"]),
    }  # fmt: skip
    distil = {"--rounds": st.integers(-1, 2), "--reconstruction-coef": number, "--distill-coef": number,
              "--student-init": st.sampled_from(["pretrained", "teacher"]),
              "--teacher": st.sampled_from([VIT, ROBERTA, "nowhere"]),
              "--representation": st.sampled_from(["cls", "mean", "max"])}  # fmt: skip
    own = {
        "further_pretrain_vit": {"--mask-ratio": number}, "self_distill_vit": {"--mask-ratio": number} | distil,
        "further_pretrain_roberta": {"--mlm-probability": number, "--max-length": st.integers(-1, 200)},
        "self_distill_roberta": {"--mlm-probability": number, "--max-length": st.integers(-1, 200)} | distil,
        "finetune": {"--method": st.sampled_from(["finetune", "recadam", "mars", "r3f"]), "--dropout": number,
                     "--max-grad-norm": number, "--mars-gamma": number, "--r3f-eps": number, "--r3f-lambda": number,
                     "--recadam-strength": number, "--recadam-midpoint": count, "--recadam-k": number,
                     "--validate": st.none(), "--mars-head-gamma": number,
                     "--r3f-noise": st.sampled_from(["uniform", "normal", "pink"]),
                     "--flip": st.sampled_from(["True", "False", "None"]), "--max-length": st.integers(-1, 200)},
    }  # fmt: skip
    flags = {name: st.fixed_dictionaries({}, optional=shared | own[name]) for name in own}
    return st.sampled_from(sorted(own)).flatmap(lambda name: st.tuples(st.just(name), flags[name]))


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_any_combination_is_refused_before_anything_is_written_or_runs(zygote, stages, tmp_path_factory, examples):
    hypothesis = pytest.importorskip("hypothesis")
    ran = []

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(combinations())
    def check(drawn):
        script, flags = drawn
        run_dir = tmp_path_factory.mktemp("any") / "run"
        small = {"--steps": 2, "--rounds": 1} if script == "self_distill_vit" else {"--steps": 2} if "vit" in script else {}
        small |= {"--epochs": 1} if "roberta" in script else {"--steps": 2}
        base = {key: value for key, value in stages[script].items() if key in ("--dataset", "--model")}
        code, _, said = zygote(script, run_dir, base | {"--batch-size": 4} | small | flags)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        if code == 0:
            assert (run_dir / "metrics.json").exists() and not errors
            weights = load_file(run_dir / "model/model.safetensors").values()
            assert all(values.isfinite().all() for values in weights), f"{script} {flags} saved weights that are not finite"
        elif code == 1:  # weights that went to infinity, say: seen under way, nothing saved that is not finite
            assert len(errors) == 1 and errors[0].startswith("error: loss or weights not finite by step "), said[-1500:]
        else:
            assert code == 2 and not run_dir.exists(), said[-1500:]
            assert len(errors) == 1 or "Parsing error" in said or "invalid choice" in said, said[-1500:]
        assert "Traceback" not in said
        ran.append(code)

    check()
    assert 0 in ran and 2 in ran


# ------------------------------------------------------------------------------------------------ the Hub
def test_a_hub_that_stops_answering_half_way_is_said_in_one_line(hub, tmp_path):
    """A server on this machine gives the configuration and half of the weights, and hangs up."""
    import http.server
    import os
    import threading

    half = (VIT / "model.safetensors").read_bytes()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            if not self.path.startswith("/some/model/resolve/") or not (VIT / name).exists():
                self.send_response(404)
                self.end_headers()
                return
            content = half if name == "model.safetensors" else (VIT / name).read_bytes()
            self.send_response(200)
            for key, value in (("Content-Length", len(content)), ("ETag", f'"{name}"'), ("X-Repo-Commit", "0" * 40)):
                self.send_header(key, str(value))
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if name == "model.safetensors" else content)
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    env |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    command = [sys.executable, str(ROOT / "further_pretrain_vit.py"), "--model", "some/model"]
    command += ["--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)
    server.shutdown()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert errors[0].startswith("error: cannot load model some/model: ")
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
