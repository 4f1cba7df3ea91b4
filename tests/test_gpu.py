"""On a GPU, skipped without one: the scripts in bf16, compiled, stopped and resumed; no wait in a step; fp32 as on the CPU."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT

DEVICE = "cuda"
VIT, ROBERTA = ROOT / "pretrained/vit-mae-tiny", ROOT / "pretrained/roberta-tiny"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHORT = ("--device", DEVICE, "--max-train-samples", 200, "--batch-size", 16, "--log-every", 2, "--eval-every", 10)
IMAGES, TEXTS = ("--steps", 20), ("--dataset", "docstrings", "--epochs", 2)
STAGES = {"further_pretrain_vit": IMAGES, "self_distill_vit": IMAGES, "further_pretrain_roberta": TEXTS,
          "self_distill_roberta": TEXTS, "finetune": IMAGES, "finetune texts": (*TEXTS[:3], 6)}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_each_script_learns_and_its_model_is_fp32(run, tmp_path, stage, compiled):
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (*SHORT, *STAGES[stage], *["--compile", "on"] * compiled)
    done = run(stage.split()[0], "--run-dir", tmp_path / "run", *flags)
    assert DEVICE in done.stdout
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    losses = [point.value for point in events.Scalars("losses/total")]
    if stage.startswith("self"):  # of round 0: the next one has another loss
        losses = losses[: len(losses) // 2]
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:3])
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert json.loads((tmp_path / "run/metrics.json").read_text())["args"]["precision"] == "auto"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_goes_on_with_the_optimizer_on_the_gpu(zygote, tmp_path, stage):
    words, final = (*SHORT, *STAGES[stage], "--precision", "fp32"), []
    flags = dict(zip(words[::2], words[1::2], strict=True))
    for name, hook in (("whole", None), ("cut", {"kind": "term", "at": 4})):
        code, _, said = zygote(stage.split()[0], tmp_path / name, flags, hook)
        assert code == (1 if hook else 0), said[-2000:]
    code, _, said = zygote(stage.split()[0], tmp_path / "cut", flags, resume=True)
    assert code == 0, said[-2000:]
    for name in ("whole", "cut"):
        final.append(json.loads((tmp_path / name / "metrics.json").read_text())["final"]["losses/total"])
    assert final[0] == pytest.approx(final[1], rel=0.05)


def image_step(sd, device, autocast):
    """A function that takes one step of self-distillation on random images that are on the device, and the model."""
    model, _ = sd.load_model(str(VIT), 0.75, torch.device(device))
    model.train()
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (64, 3, 28, 28), np.uint8)).to(device)
    norm = torch.tensor([[0.5] * 3, [0.25] * 3], device=device)[..., None, None]
    teacher_cls = sd.encode_all(model.vit, images, norm, autocast) + 0.1
    args = sd.Args(learning_rate=1e-4, warmup_ratio=0.0)
    optimizer, scheduler = sd.optimizer_and_schedule(model, args, 100, (0.9, 0.95))

    def step():
        rows = rng.integers(0, 64, 16)
        noise = sd.upload(rng.random((16, 64), np.float32), torch.device(device))
        pixels, target = sd.take(images, rows, norm, 64), teacher_cls[sd.upload(rows, torch.device(device))]
        return sd.update(model, optimizer, scheduler, pixels, noise, autocast, target, args)

    return step, model


def test_a_step_on_images_does_not_wait_for_the_gpu(script):
    step, _ = image_step(script("self_distill_vit"), DEVICE, torch.autocast(DEVICE, torch.bfloat16))
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) for value in losses.values())


def test_in_fp32_the_gpu_does_what_the_cpu_does(script):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found = {}
    for device in ("cpu", DEVICE):
        step, model = image_step(script("self_distill_vit"), device, torch.autocast(device, enabled=False))
        found[device] = [{key: value.item() for key, value in step().items()} for _ in range(3)], model.cpu().state_dict()
    for one, two in zip(found["cpu"][0], found[DEVICE][0], strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    for key, weights in found["cpu"][1].items():  # three steps of Adam move a weight by 3e-4 at most, whatever its gradient
        if key.endswith(("k_proj.bias", "key.bias")):  # softmax does not see it: its gradient is what rounding leaves of 0
            continue
        apart = (weights - found[DEVICE][1][key]).abs()
        assert (apart > 2e-5).float().mean() < 0.02, key


@pytest.mark.parametrize("stage", ["further_pretrain_vit", "self_distill_vit"])
def test_a_graph_of_the_step_trains_as_the_step_does(script, stage):
    """Seven steps, fp32, a learning rate that changes at each: eager all, and eager three, then as the loop does."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    module, device, found = script(stage), torch.device(DEVICE), []
    for graphed in (False, True):
        model, _ = module.load_model(str(VIT), 0.75, device)
        model.train()
        args = module.Args(learning_rate=1e-3, warmup_ratio=0.4)
        optimizer, scheduler = module.optimizer_and_schedule(model, args, 10, (0.9, 0.95))
        rng, step, losses = np.random.default_rng(0), module.update, []
        for i in range(7):
            pixels, noise, target = (module.upload(rng.standard_normal(shape).astype(np.float32), device)
                                     for shape in ((16, 3, 64, 64), (16, 64), (16, 192)))  # fmt: skip
            inputs = (pixels, noise, torch.autocast(DEVICE, enabled=False), *[target, args] * stage.startswith("self"))
            if graphed and i == 3:
                step = module.as_cuda_graph(module.update, model, optimizer, scheduler, *inputs)
            losses.append({key: value.item() for key, value in step(model, optimizer, scheduler, *inputs).items()})
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        found.append((losses, groups, scheduler.get_last_lr(), {k: v.clone() for k, v in model.state_dict().items()}))
    (eager, *settings, weights), (replayed, *same, others) = found
    assert settings == same  # the optimizer's settings are numbers again, and the schedule is where it should be
    for one, two in zip(eager, replayed, strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    for key, value in weights.items():  # as above: a bias of keys has no gradient but rounding's
        if not key.endswith(("k_proj.bias", "key.bias")):
            assert ((value - others[key]).abs() > 1e-4).float().mean() < 0.02, key
