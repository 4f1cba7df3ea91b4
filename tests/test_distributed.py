"""Two processes share a batch and end where one does, to fp32 rounding; so does a compiled run."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN
from safetensors.torch import load_file
from test_roberta import config, word_tokenizer

VIT = ROOT / "pretrained/vit-mae-tiny"


@pytest.fixture(scope="module")
def inputs(hub, tmp_path_factory):
    """A RoBERTa without dropout, whose draws differ from process to process, and 23 texts: one batch of 7, 4 and 3."""
    from transformers import RobertaForMaskedLM

    base = tmp_path_factory.mktemp("distributed")
    shape = config("roberta")
    shape.hidden_dropout_prob = shape.attention_probs_dropout_prob = 0.0
    RobertaForMaskedLM(shape).save_pretrained(base / "model")
    word_tokenizer().save_pretrained(base / "model")
    rng = np.random.default_rng(0)
    (base / "texts").mkdir()
    for split, n in (("train", 23), ("test", 4)):
        rows = [{"text": " ".join(f"w{i}" for i in rng.integers(0, 90, 3 + i)), "label": "ab"[i % 2]} for i in range(n)]
        (base / f"texts/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = ["--model", VIT, "--max-train-samples", 40, "--steps", 6]
    texts = ["--model", base / "model", "--dataset", base / "texts", "--epochs", 2]
    tuned = {f"finetune {kind}": [*images, "--dropout", 0.0, "--method", kind] for kind in ("recadam", "mars", "r3f")}
    tuned["finetune"] = [*images, "--dropout", 0.0, "--flip", "True"]
    return tuned | {"further_pretrain_vit": images, "self_distill_vit": images,
            "further_pretrain_roberta": texts, "self_distill_roberta": texts, "finetune texts": texts}  # fmt: skip


def agree(tmp_path, one, two):
    """Two runs have the same curves and end with the same weights, to fp32 rounding."""
    curves = {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for kind in (one, two):
        assert len(list((tmp_path / kind).glob("events*"))) == 1  # rank 0 alone writes
        events = EventAccumulator(str(tmp_path / kind)).Reload()
        found = [tag for tag in events.Tags()["scalars"] if "per_second" not in tag]
        curves[kind] = {tag: [e.value for e in events.Scalars(tag)] for tag in found}
    assert curves[one].keys() == curves[two].keys() and len(curves[one]["losses/total"]) >= 6
    for tag, values in curves[one].items():
        np.testing.assert_allclose(curves[two][tag], values, rtol=2e-3, atol=1e-6, err_msg=tag)
    np.testing.assert_allclose(curves[two]["losses/total"][0], curves[one]["losses/total"][0], rtol=1e-5)
    first, second = (load_file(tmp_path / kind / "model/model.safetensors") for kind in (one, two))
    steps = len(curves[one]["losses/total"])
    for key in first:  # Adam's first steps are lr * sign(gradient): a gradient of all but zero may go either way,
        if key.endswith("key.bias"):  # and this one is zero: softmax does not see what all keys have in common
            continue
        apart = (first[key] - second[key]).abs()
        off = (apart > 2e-6).float().mean().item()
        assert off < 0.02, f"{key}: {off:.1%} of the weights are elsewhere"
        assert apart.max() <= 2 * steps * 1e-4, f"{key}: farther apart than the steps are long"


SLOW = ("further_pretrain_vit", "further_pretrain_roberta", "finetune", "finetune recadam", "finetune mars", "finetune r3f")
STAGES = ["self_distill_vit", "self_distill_roberta", "finetune texts"]
STAGES += [pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_agree_with_one(run, hub, inputs, tmp_path, stage):
    name = stage.split()[0]
    flags = [*inputs[stage], "--batch-size", 8, "--learning-rate", 1e-4, "--log-every", 1, "--eval-every", 0]
    run(name, *flags, "--run-dir", tmp_path / "one")
    run(name, *flags, "--run-dir", tmp_path / "two", two=True, own=stage == STAGES[0])  # by torchrun itself
    agree(tmp_path, "one", "two")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES[:3], "finetune", "finetune r3f"])
def test_a_compiled_run_agrees_with_an_eager_one(run, inputs, tmp_path, stage):
    flags = [*inputs[stage], "--batch-size", 8, "--learning-rate", 1e-4, "--log-every", 1, "--eval-every", 0]
    run(stage.split()[0], *flags, "--run-dir", tmp_path / "eager")
    run(stage.split()[0], *flags, "--run-dir", tmp_path / "compiled", "--compile", "on")
    agree(tmp_path, "eager", "compiled")


@pytest.mark.parametrize("name", ["further_pretrain_roberta", "self_distill_roberta", "finetune"])
def test_processes_drop_differently_and_a_resumed_run_as_before(name):
    line = next(line for line in (ROOT / f"{name}.py").read_text().splitlines() if "manual_seed(int(rng" in line)
    drawn = []
    for rank in (0, 1, 0):
        exec(line.strip(), {"torch": torch, "rng": np.random.default_rng(3), "rank": rank})  # as its main part does
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("late", [True, False])
def test_a_signal_while_the_losses_are_shared_waits_for_all_processes(script, monkeypatch, late):
    """One that comes in after it was counted would stop this process alone, and leave the others waiting for it."""
    sd, stop = script("self_distill_vit"), []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: (values.mul_(2), late and stop.append(15)))
    if not late:
        stop.append(15)
    values, stopping = sd.average({"losses/total": torch.tensor(3.0)}, 5, stop, 2)
    assert values == {"losses/total": 3.0} and stopping == (not late) and stop == [15]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(torch.tensor([3.0, float(late)])))
    values, stopping = sd.average({"losses/total": torch.tensor(3.0)}, 5, [], 2)  # one that the other process got
    assert values == {"losses/total": 3.0} and stopping == late


def test_a_complete_run_is_left_by_all_processes(run, tmp_path):
    flags = ("--max-train-samples", 40, "--steps", 1, "--batch-size", 8, "--eval-every", 0, "--run-dir", tmp_path / "run")
    run("further_pretrain_vit", *flags)
    done = run("further_pretrain_vit", *flags, "--resume", two=True)
    assert done.stdout.count(f"{tmp_path}/run is complete: nothing to resume") == 2


def test_an_error_that_nobody_foresaw_is_said_by_one_of_many(run, tmp_path):
    flags = ("--max-train-samples", 40, "--steps", 2, "--batch-size", 8, "--eval-every", 0, "--run-dir", tmp_path / "run")
    done = run("further_pretrain_vit", *flags, two=True, code=1, hook={"kind": "full", "at": 1})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--debug shows where" in errors[0], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
def test_asked_to_stop_all_processes_leave_one_checkpoint(run, hub, tmp_path, to_all):
    """SIGTERM to torchrun, which passes it on; or to it and to each of its processes at once, as a cluster does."""
    flags = ("--max-train-samples", 40, "--steps", 300, "--batch-size", 8, "--eval-every", 0, "--log-every", 1)
    flags = (*flags, "--run-dir", tmp_path / "run")
    command = [sys.executable, *TORCHRUN, str(ROOT / "further_pretrain_vit.py"), *map(str, flags)]
    (tmp_path / "said").touch()
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, cwd=hub, start_new_session=True)
        while "reconstruction=" not in (tmp_path / "said").read_text() and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "said").read_text()[-2000:]
        found = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout.split()
        for number in found if to_all else [process.pid]:
            os.kill(int(number), signal.SIGTERM)
        assert process.wait(timeout=120) != 0
    lines = [line for line in (tmp_path / "said").read_text().replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "stopped by a signal at step " in lines[0] and (tmp_path / "run/resume.pt").exists()
    run("further_pretrain_vit", *flags, "--resume", two=True, own=True)
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.parametrize(("name", "flags", "line"), [
    ("further_pretrain_vit", (7, 40), "--batch-size 7 is for all processes together: it must be a multiple of 2"),
    ("self_distill_roberta", (8, 17), "the last batch has 1 texts for 2 processes: give another --batch-size"),
    ("finetune", (8, 17), "the last batch has 1 samples for 2 processes: give another --batch-size"),
])  # fmt: skip
def test_a_batch_that_cannot_be_shared_is_refused(run, inputs, tmp_path, name, flags, line):
    texts = inputs["finetune texts"] if name != "further_pretrain_vit" else ()
    flags = (*texts, "--batch-size", flags[0], "--max-train-samples", flags[1], "--run-dir", tmp_path / "run")
    done = run(name, *flags, two=True, code=2)
    assert not (tmp_path / "run").exists() and f"error: {line}" in done.stderr, done.stderr[-2000:]
