"""The image half: the method against slow versions written here, each script as a process, hand-offs, faults."""

import contextlib
import copy
import io
import itertools
import json
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, images_of, is_the_line
from PIL import Image
from safetensors.torch import load_file

TINY = ROOT / "pretrained/vit-mae-tiny"
FP32 = torch.autocast("cpu", enabled=False)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def sd(script):
    return script("self_distill_vit")


@pytest.fixture(scope="module")
def fp(script):
    return script("further_pretrain_vit")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 64, 64, generator=generator), torch.rand(4, 64, generator=generator)


def tiny(module, moved=0.0):
    """The embedded model, with some noise on its weights where `moved`."""
    model, _ = module.load_model(str(TINY), 0.75, torch.device("cpu"))
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += moved * torch.randn_like(p) * p.requires_grad
    return model.train()


def slow_reconstruction(logits, pixels, noise, patch=8):
    """Masked auto-encoding loss, patch by patch: logits (B, L, 3 * patch ** 2) against normalised pixels of hidden patches."""
    errors = []
    for b in range(len(pixels)):
        hidden = noise[b].argsort()[len(noise[b]) // 4 :]  # the quarter with the lowest noise is seen
        for i in hidden.tolist():
            row, column = divmod(i, pixels.shape[-1] // patch)
            block = pixels[b, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            target = block.permute(1, 2, 0).flatten()  # pixel by pixel, colours last
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((logits[b, i] - target).pow(2).mean())
    return torch.stack(errors).mean()


# ------------------------------------------------------------------------------------------------ the method
@pytest.mark.parametrize("name", ["further_pretrain_vit", "self_distill_vit"])
def test_what_is_around_a_cuda_graph_keeps_inputs_rate_and_schedule(script, name, monkeypatch):
    """Without a GPU, with a graph that is played back here: what it took down is done again, with what is then in its tensors.
    Seven steps end where they end by `update` alone. On a GPU tests/test_gpu.py does this with a real graph."""
    module, tape, found = script(name), {}, []

    def take_down(model, optimizer, scheduler, *inputs):
        settings = [(group["lr"], group["capturable"]) for group in optimizer.param_groups]
        assert all(isinstance(rate, torch.Tensor) and rate.device == inputs[0].device and able for rate, able in settings)
        tape.update(rates=[rate for rate, _ in settings], scheduler=scheduler, inputs=inputs, losses={})
        tape["losses"] |= {key: torch.zeros(()) for key in ("losses/total", "losses/reconstruction", "charts/grad_norm")}
        return tape["losses"]

    class Graph:
        def replay(self):
            numbers = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, tape["rates"], strict=True):
                group["lr"] = rate.item()  # what lies on the device when the graph runs
            losses = module.update(model, optimizer, tape["scheduler"], *tape["inputs"])
            for key, value in tape["losses"].items():
                value.copy_(losses[key])
            for group, number in zip(optimizer.param_groups, numbers, strict=True):
                group["lr"] = number

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    for graphed in (False, True):
        model, rng = tiny(module), np.random.default_rng(0)
        args = module.Args(learning_rate=1e-3, warmup_ratio=0.4)
        optimizer, scheduler = module.optimizer_and_schedule(model, args, 10, (0.9, 0.95))
        scheduler.base_lrs[1] /= 2  # a rate for each group, as of layers
        step, curves = module.update, []
        for i in range(7):
            pixels, noise, target = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
                                     for shape in ((4, 3, 64, 64), (4, 64), (4, 192)))  # fmt: skip
            inputs = (pixels, noise, FP32, *[target, args] * name.startswith("self"))
            if graphed and i == 3:
                step = module.as_cuda_graph(take_down, model, optimizer, scheduler, *inputs)
                assert all(isinstance(g["lr"], float) and not g["capturable"] for g in optimizer.param_groups)
            losses = step(model, optimizer, scheduler, *inputs)
            losses["mine"] = 0  # the caller's to change
            curves.append([losses["losses/total"].item(), losses["charts/grad_norm"].item(), scheduler.get_last_lr()])
        assert "mine" not in tape.get("losses", {})
        if graphed:  # what is not a tensor would be frozen
            with pytest.raises(AttributeError, match="copy_"):
                step(model, optimizer, scheduler, *inputs[:2], contextlib.nullcontext(), *inputs[3:])
        found.append((curves, {key: value.clone() for key, value in model.state_dict().items()}))
    (eager, weights), (replayed, others) = found
    assert [rates for *_, rates in eager] == [rates for *_, rates in replayed] and len({rates[0] for *_, rates in eager}) > 5
    for (*one, _), (*two, _) in zip(eager, replayed, strict=True):
        assert one == pytest.approx(two, rel=1e-5)  # the rate on the device has 24 bits
    for key in weights:
        if not key.endswith(("k_proj.bias", "key.bias")):  # softmax does not see it: its gradient is what rounding leaves of 0
            torch.testing.assert_close(weights[key], others[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["further_pretrain_vit", "self_distill_vit"])
def test_the_projection_as_one_product_is_the_librarys_convolution(script, name):
    """Output and gradients, on noise, where a shuffled patch would show."""
    model = tiny(script(name))
    layer = model.vit.embeddings.patch_embeddings.projection
    pixels, grads = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3)), []
    for forward in (type(layer).forward.__get__(layer), layer.forward):
        out = forward(pixels)
        assert out.shape == (3, 192, 8, 8)
        grads.append([out, *torch.autograd.grad((out * out.detach().roll(1, 0)).sum(), layer.parameters())])
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    other, before = copy.deepcopy(model), layer(pixels)
    layer.weight.data.zero_()  # a copy, such as a moving average, has weights of its own
    assert torch.equal(other.vit.embeddings.patch_embeddings.projection(pixels), before)


def test_reconstruction_is_the_librarys_and_the_slow_versions(fp, batch):
    pixels, noise = batch
    model = tiny(fp)
    out = model(pixels, noise=noise)
    assert out.mask.sum() == 4 * 48  # 75 % of 64 patches
    optimizer, scheduler = fp.optimizer_and_schedule(model, fp.Args(learning_rate=0.0, warmup_ratio=0.0), 1, (0.9, 0.95))
    losses = fp.update(model, optimizer, scheduler, pixels, noise, FP32)
    assert losses["losses/reconstruction"] == out.loss == losses["losses/total"]
    torch.testing.assert_close(out.loss, slow_reconstruction(out.logits, pixels, noise))


def test_whole_image_encoding_is_vitmodels(sd, batch):
    from transformers import ViTModel

    vit = ViTModel.from_pretrained(TINY, add_pooling_layer=False).float().eval()
    model = tiny(sd).eval()
    torch.testing.assert_close(sd.encode(model.vit, batch[0]), vit(batch[0]).last_hidden_state[:, 0], rtol=1e-5, atol=1e-5)
    assert model.config.mask_ratio == 0.75  # put back: the next forward masks again
    assert model(batch[0], noise=batch[1]).mask.sum() == 4 * 48


def test_in_bf16_the_gradient_on_digits_is_near_that_of_fp32(fp):
    """Rounded pixels would shift a whole background at once, so the patches' projection stays in fp32."""
    model, gradients = tiny(fp), []
    digits = [np.asarray(row["image"].convert("RGB")).transpose(2, 0, 1) for row in itertools.islice(fp.mnist5k("train"), 32)]
    norm = torch.tensor(IMAGENET)[..., None, None]
    pixels, noise = fp.take(digits, np.arange(32), norm, 64), torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(pixels, noise=noise).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    apart = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert 0 < apart < 0.1  # above 1 with the projection in bf16


def test_finetune_keeps_pixels_in_fp32_too(script):
    from transformers import AutoConfig

    model = script("finetune").load_model(str(TINY), AutoConfig.from_pretrained(TINY), ["a", "b"], 0.0)[0]
    scope = {"model": model, "device": torch.device("cpu"), "torch": torch}
    for line in (ROOT / "finetune.py").read_text().splitlines():
        if line.startswith("        projection"):  # as its main part does
            exec(line.strip(), scope)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.vit.embeddings.patch_embeddings(torch.zeros(1, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize(("representation", "tokens"), [("cls", 1), ("mean", 65)])
def test_the_last_layers_mlp_sees_only_what_is_read(sd, batch, representation, tokens):
    """Nothing after the last layer reads the other tokens, so they are spared its MLP, in whole images and nowhere else."""
    model, seen = tiny(sd).eval(), []
    norms = [m for name, m in model.vit.named_modules() if name.endswith("layernorm_after")]
    for norm in norms:
        norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    sd.encode(model.vit, batch[0], representation)
    assert seen == [65] * (len(norms) - 1) + [tokens]
    seen.clear()
    model(batch[0], noise=batch[1])
    assert seen == [17] * len(norms)  # CLS and the 16 patches that are not hidden


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4])
def test_compiled_encoding_is_the_same_whatever_was_asked_for_before(sd, batch, layers):
    """The tokens kept in the last layer differ from call to call, and all layers share a graph."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config, kinds = ViTMAEConfig.from_pretrained(TINY, num_hidden_layers=layers), ("cls", "mean", "cls")
    model = ViTMAEForPreTraining.from_pretrained(TINY, config=config).float().eval()
    with torch.no_grad():
        plain = [sd.encode(model.vit, batch[0], kind) for kind in kinds]
        masked = model(batch[0], noise=batch[1]).loss
        for part in [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]:
            [layer.compile() for layer in part]
        for kind, vectors in zip(kinds, plain, strict=True):
            torch.testing.assert_close(sd.encode(model.vit, batch[0], kind), vectors, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(batch[0], noise=batch[1]).loss, masked)


def test_what_is_saved_says_how_images_were_resized(sd, tmp_path):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "resample": 3, "size": {"height": 224, "width": 224}, "do_normalize": False, "rescale_factor": 0.1,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))  # fmt: skip
    _, processor = sd.load_model(str(tmp_path / "model"), 0.75, torch.device("cpu"))
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/preprocessor_config.json").read_text())
    assert (saved["resample"], saved["size"]) == (2, {"height": 64, "width": 64})  # 2: bilinear, as decode does
    assert saved["do_normalize"] and saved["rescale_factor"] == pytest.approx(1 / 255)  # as take does
    assert (saved["image_mean"], saved["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_dropout_of_the_configuration_is_left_out(sd, fp, tmp_path):
    """Masked auto-encoders have none. With it, a look at the model would change what is trained, and a resume as well."""
    model, _ = sd.load_model(str(TINY), 0.75, torch.device("cpu"))
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.3
    model.save_pretrained(tmp_path / "model")
    shutil.copy(TINY / "preprocessor_config.json", tmp_path / "model")
    pixels, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 64)
    for module in (sd, fp):
        again = module.load_model(str(tmp_path / "model"), 0.75, torch.device("cpu"))[0].train()
        assert torch.equal(again(pixels, noise=noise).loss, model.train()(pixels, noise=noise).loss)


def test_gradients_are_those_of_two_backward_passes_with_a_live_teacher(sd, batch):
    """As in the authors' code: loss by loss, the teacher run at the step. Ours sums the losses, its teacher is a constant."""
    pixels, noise = batch
    student, slow, teacher = tiny(sd), tiny(sd), tiny(sd, moved=0.01).eval()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    images = [(p * 50 + 128).clamp(0, 255).byte().numpy() for p in pixels]
    norm = torch.zeros(2, 3, 1, 1) + torch.tensor([0.5, 0.25]).view(2, 1, 1, 1)
    pixels = sd.take(images, np.arange(4), norm, 64)
    constants = sd.encode_all(teacher.vit, images, norm, FP32)

    args = sd.Args(learning_rate=1e-3, warmup_ratio=0.0, reconstruction_coef=0.5, distill_coef=2.0)
    optimizer, scheduler = sd.optimizer_and_schedule(student, args, 10, (0.9, 0.95))
    optimizer.zero_grad = lambda: None  # keep the gradients to look at
    losses = sd.update(student, optimizer, scheduler, pixels, noise, FP32, constants, args)

    (0.5 * slow(pixels, noise=noise).loss).backward()
    in_order = torch.arange(64).repeat(4, 1)
    slow.config.mask_ratio = 0.0
    cls = slow.vit(pixels, noise=in_order).last_hidden_state[:, 0]
    with torch.no_grad():
        teacher.config.mask_ratio = 0.0
        target = teacher.vit(pixels, noise=in_order).last_hidden_state[:, 0]
    distance = sum(((cls[b] - target[b]) ** 2).sum() for b in range(4)) / 4
    (2.0 * distance).backward()

    torch.testing.assert_close(losses["losses/distill"], distance.detach())
    assert losses["losses/distill"] > 1e-3
    for (name, p), q in zip(student.named_parameters(), slow.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == ("position_embeddings" in name or "pos_embed" in name)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
            assert not torch.equal(p, tiny_parameter(sd, name)), f"{name} did not move"
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def tiny_parameter(module, name, cache={}):  # noqa: B006
    return cache.setdefault("weights", dict(tiny(module).named_parameters()))[name]


@pytest.mark.parametrize("ablated", ["reconstruction_coef", "distill_coef"])
def test_a_coefficient_of_zero_leaves_its_term_out(sd, batch, ablated):
    student, teacher_cls = tiny(sd), torch.zeros(4, 192)
    args = sd.Args(learning_rate=0.0, warmup_ratio=0.0, **{ablated: 0.0})
    optimizer, scheduler = sd.optimizer_and_schedule(student, args, 1, (0.9, 0.95))
    optimizer.zero_grad = lambda: None  # keep the gradients to look at
    losses = sd.update(student, optimizer, scheduler, *batch, FP32, teacher_cls, args)
    kept = "losses/distill" if ablated == "reconstruction_coef" else "losses/reconstruction"
    assert losses["losses/total"] == losses[kept]
    slow = tiny(sd)
    reconstruction, distance = slow(batch[0], noise=batch[1]).loss, sd.encode(slow.vit, batch[0]).pow(2).sum() / 4
    (reconstruction if ablated == "distill_coef" else distance).backward()
    for (name, p), q in zip(student.named_parameters(), slow.parameters(), strict=True):
        if p.requires_grad:
            expected = torch.zeros_like(p) if q.grad is None else q.grad
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_weight_decay_is_on_matrices_only_and_groups_cover_all(fp):
    model = tiny(fp)
    optimizer, _ = fp.optimizer_and_schedule(model, fp.Args(learning_rate=1.0, warmup_ratio=0.0), 1, (0.9, 0.95))
    groups = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, p in model.named_parameters():
        assert groups.get(id(p)) == (None if not p.requires_grad else 0.01 if p.ndim > 1 else 0.0), name


def test_knn_probe_against_loops(sd):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    vectors = torch.from_numpy(rng.normal(size=(60, 8)) + 2 * np.eye(8)[labels])
    hits = 0
    for i in range(60):
        cosine = [-9 if j == i else float(vectors[i] @ vectors[j] / vectors[i].norm() / vectors[j].norm()) for j in range(60)]
        votes = np.bincount(labels[np.argsort(cosine)[-5:]], minlength=3)
        hits += votes.argmax() == labels[i]
    assert sd.knn_accuracy(vectors, labels, k=5) == pytest.approx(hits / 60)
    assert sd.knn_accuracy(vectors, labels) == sd.knn_accuracy(vectors, labels, k=20) != sd.knn_accuracy(vectors, labels, k=1)


def test_picture_shows_visible_patches_untouched_and_hidden_ones_at_the_right_brightness(sd, batch):
    norm = torch.zeros(2, 3, 1, 1) + torch.tensor([0.5, 0.25]).view(2, 1, 1, 1)
    model = tiny(sd)
    model.decoder.decoder_pred.weight.data.zero_()  # predicts 0: each hidden patch must come out as its own mean
    model.decoder.decoder_pred.bias.data.zero_()
    pixels = batch[0].clamp(-1, 1)
    grid = sd.picture(model, pixels, batch[1], norm)  # (3, 3 * 66 + 2, 4 * 66 + 2)
    assert grid.shape == (3, 200, 266)
    shown, original = grid[:, 134:198, 2:66], pixels[0] * 0.25 + 0.5
    for i in range(64):
        where = (slice(None), slice(i // 8 * 8, i // 8 * 8 + 8), slice(i % 8 * 8, i % 8 * 8 + 8))
        seen = i in batch[1][0].argsort()[:16]
        expected = original[where] if seen else original[where].mean().expand(3, 8, 8)
        torch.testing.assert_close(shown[where], expected, rtol=0, atol=1e-5)
    for b in range(4):  # the rows above: the input, and what the model sees of it, the rest grey
        columns, original = slice(2 + 66 * b, 66 + 66 * b), pixels[b] * 0.25 + 0.5
        torch.testing.assert_close(grid[:, 2:66, columns], original)
        hidden = torch.ones(64).index_fill(0, batch[1][b].argsort()[:16], 0).view(8, 8).kron(torch.ones(8, 8)).bool()
        torch.testing.assert_close(grid[:, 68:132, columns], torch.where(hidden, 0.5, original))


# ------------------------------------------------------------------------------------------------ the scripts
def tags(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


SMALL = ("--max-train-samples", 400, "--batch-size", 32)


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """One run of each pre-training script on mnist5k."""
    base = tmp_path_factory.mktemp("runs")
    flags = ("--steps", 30, "--log-every", 5, "--eval-every", 20, "--save-every", 10, "--label-column", "label", *SMALL)
    out = {}
    for name in ("further_pretrain_vit", "self_distill_vit"):
        out[name] = base / name, run(name, "--run-dir", base / name, *flags, own=True)
    return out


def test_further_pretraining_learns_and_leaves_the_right_files(runs, hub):
    run_dir, done = runs["further_pretrain_vit"]
    assert {p.name for p in run_dir.iterdir() if not p.name.startswith("events")} == {"model", "metrics.json"}
    assert {p.name for p in (run_dir / "model").iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    events, scalars = tags(run_dir)
    assert set(scalars) == {"losses/reconstruction", "losses/total", "charts/learning_rate", "charts/grad_norm",
                            "charts/samples_per_second", "charts/distance_from_init", "eval/knn_accuracy",
                            "eval/knn_accuracy_start"}  # fmt: skip
    assert [step for step, _ in scalars["losses/total"]] == [5, 10, 15, 20, 25, 30]
    assert [step for step, _ in scalars["eval/knn_accuracy"]] == [20, 30]  # and at the end
    assert scalars["losses/reconstruction"][-1][1] < 0.9 * scalars["losses/reconstruction"][0][1]
    assert 0 < scalars["charts/distance_from_init"][0][1] < scalars["charts/distance_from_init"][-1][1]
    assert events.Tags()["images"] == ["eval/reconstruction"] and "args/text_summary" in events.Tags()["tensors"]
    assert events.Images("eval/reconstruction")[0].width == 8 * 66 + 2
    assert b"|steps|30|" in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0] and '"steps": 30' in done.stdout
    assert "(a small run: real digits and a tiny model)" in done.stdout and "reconstruction=" in done.stderr
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["stage"] == "further_pretrain_vit" and metrics["parent"] == str(TINY)
    assert metrics["args"]["steps"] == 30 and set(metrics["versions"]) == {"torch", "torchvision", "transformers", "datasets"}
    assert metrics["final"]["losses/reconstruction"] == pytest.approx(scalars["losses/reconstruction"][-1][1])
    python, then, *flags = shlex.split(done.stdout.strip().splitlines()[-1])
    assert python == "python" and (hub / then).resolve() == ROOT / "self_distill_vit.py"
    assert flags == shlex.split(
        "--dataset mnist5k --label-column label --max-train-samples 400 --seed 1 --steps 30 --batch-size 32 "
        "--learning-rate 0.0005 --weight-decay 0.01 "
        f"--warmup-ratio 0.0 --mask-ratio 0.75 --model {TINY} --teacher {run_dir}/model")  # fmt: skip


def test_self_distillation_is_round_0_plus_rounds(runs):
    run_dir, done = runs["self_distill_vit"]
    metrics = json.loads((run_dir / "metrics.json").read_text())
    head = subprocess.run("git rev-parse -q --verify HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
    assert metrics["parent"] == f"{TINY}, teacher round 0" and metrics["git_commit"] == head.stdout.strip()
    assert metrics["samples_per_second"] == pytest.approx(60 * 32 / metrics["seconds"], rel=0.05)
    chart = tags(run_dir)[1]["charts/samples_per_second"]
    assert chart[-1][1] == pytest.approx(metrics["samples_per_second"], rel=0.4)
    assert "reconstruction=" in done.stderr and "distill=" in done.stderr and "round 1" in done.stderr
    assert "(a small run: real digits and a tiny model)" in done.stdout
    python, then, *flags = shlex.split(done.stdout.strip().splitlines()[-1])  # what it says comes next
    assert python == "python" and then.endswith("finetune.py")
    said = "--dataset mnist5k --label-column label --max-train-samples 400 --seed 1"
    assert flags == shlex.split(f"{said} --model {run_dir}/model")
    files = {p.name for p in run_dir.iterdir() if not p.name.startswith("events")}
    assert files == {"model", "round_0", "round_1", "metrics.json"}
    _, scalars = tags(run_dir)
    assert {"losses/distill", "charts/distill_unexplained", "eval/knn_accuracy_teacher"} < set(scalars)
    distill = dict(scalars["losses/distill"])
    assert min(distill) == 35 and max(distill) == 60  # none in round 0
    assert distill[60] < 0.5 * distill[35]
    for tag, falls in (("losses/reconstruction", 0.9), ("losses/total", 0.9)):
        values = dict(scalars[tag])
        assert values[30] < falls * values[5] and values[60] < falls * values[35], tag
    further = load_file(runs["further_pretrain_vit"][0] / "model/model.safetensors")
    round_0, round_1, final = (load_file(run_dir / name / "model.safetensors") for name in ("round_0", "round_1", "model"))
    assert all(torch.equal(further[k], round_0[k]) for k in further)  # Algorithm 2 is round 0 of Algorithm 1, bit for bit
    assert all(torch.equal(round_1[k], final[k]) for k in final)
    assert any(not torch.equal(round_0[k], round_1[k]) for k in final)


def test_each_round_starts_a_student_from_the_original_weights(zygote, sd, tmp_path):
    """Rounds of one step each are replayed here by hand from the original weights, with the last round as teacher."""
    flags = {"--steps": 1, "--rounds": 2, "--batch-size": 8, "--learning-rate": 1e-3, "--eval-every": 0}
    code, _, said = zygote("self_distill_vit", tmp_path / "run", flags | {"--max-train-samples": 40})
    assert code == 0, said
    events, scalars = tags(tmp_path / "run")
    assert not any(tag.startswith("eval/") for tag in [*scalars, *events.Tags()["images"]])  # --eval-every 0
    data, _ = images_of(sd, sd.resolve(sd.Args(run_dir=str(tmp_path / "x"), max_train_samples=40)), 28)
    images, norm = data["train"][0], torch.tensor(IMAGENET)[..., None, None]
    args = sd.Args(learning_rate=1e-3, warmup_ratio=0.0)
    for t in range(3):
        rows = np.random.default_rng([1, t, 0, 0]).permutation(len(images))[:8]
        noise = torch.from_numpy(np.random.default_rng([1, t, 1, 0]).random((8, 64), np.float32))
        student, teacher_cls, pixels = tiny(sd), None, sd.take(images, rows, norm, 64)
        if t:
            teacher, _ = sd.load_model(str(tmp_path / f"run/round_{t - 1}"), 0.75, torch.device("cpu"))
            with torch.no_grad():
                teacher_cls = sd.encode(teacher.eval().vit, pixels)
        sd.update(student, *sd.optimizer_and_schedule(student, args, 1, (0.9, 0.95)), pixels, noise, FP32, teacher_cls, args)
        found = sd.load_model(str(tmp_path / f"run/round_{t}"), 0.75, torch.device("cpu"))[0].state_dict()
        for name, expected in student.state_dict().items():
            assert torch.equal(found[name], expected), f"round {t}, {name}"


def test_a_teacher_takes_the_place_of_round_0(runs, run, tmp_path):
    """Stage 1, then stage 2 with its model as the teacher, is what one command does in two rounds, bit for bit."""
    flags = ("--steps", 30, "--eval-every", 15, "--log-every", 5, *SMALL)
    run("self_distill_vit", "--teacher", runs["further_pretrain_vit"][0] / "model", "--run-dir", tmp_path / "run", *flags)
    files = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("events")}
    assert files == {"model", "round_1", "metrics.json"}
    parent = json.loads((tmp_path / "run/metrics.json").read_text())["parent"]
    assert parent == f"{TINY}, teacher {runs['further_pretrain_vit'][0]}/model"
    both = runs["self_distill_vit"][0], tmp_path / "run"
    one, two = (load_file(run_dir / "round_1/model.safetensors") for run_dir in both)
    assert all(torch.equal(one[key], two[key]) for key in one)
    first, one, two = (tags(run_dir)[1] for run_dir in (runs["further_pretrain_vit"][0], *both))
    assert [(step - 30, value) for step, value in one["losses/distill"]] == two["losses/distill"]
    last = dict(first["eval/knn_accuracy"])[30]  # of stage 1, which is round 0 and what the teacher has
    assert dict(one["eval/knn_accuracy"])[30] == last and len({value for _, value in one["eval/knn_accuracy"]}) > 1
    assert one["eval/knn_accuracy_teacher"] == [(31, last)] and two["eval/knn_accuracy_teacher"] == [(1, last)]


@pytest.mark.parametrize("source", ["further_pretrain_vit", "self_distill_vit", None])
def test_finetune_takes_over(runs, run, tmp_path, source):
    model, steps = (("--model", runs[source][0] / "model"), 4) if source else ((), 80)
    done = run("finetune", "--run-dir", tmp_path / "run", "--steps", steps, "--log-every", 2, *model, own=source is None)
    came = f"encoder loaded from {model[1] if source else TINY}, new: classifier.bias, classifier.weight, left out: decoder"
    assert came in done.stdout
    final = json.loads((tmp_path / "run/metrics.json").read_text())["final"]
    _, scalars = tags(tmp_path / "run")
    assert {"test/accuracy", "test/macro_f1", "test/micro_f1", "losses/total"} < set(scalars)
    assert [step for step, _ in scalars["test/accuracy"]] == [steps]  # test is looked at once
    assert final["test/metric"] == final["test/accuracy"] == pytest.approx(scalars["test/accuracy"][0][1])
    wrote, then = done.stdout.strip().splitlines()[-2:]
    assert wrote.startswith(f"wrote {tmp_path}/run/model: test accuracy {final['test/accuracy']:.4f}, ")
    python, c, code = shlex.split(then)
    assert (python, c) == ("python", "-c") and f't.pipeline("image-classification", "{tmp_path}/run/model")("a.png")' in code
    processor = json.loads((tmp_path / "run/model/preprocessor_config.json").read_text())
    assert (processor["resample"], processor["image_mean"]) == (2, list(IMAGENET[0]))
    if source is None:
        metrics = json.loads((tmp_path / "run/metrics.json").read_text())
        assert metrics["samples_per_second"] == pytest.approx(80 * 32 / metrics["seconds"], rel=0.05)
        assert final["charts/samples_per_second"] == pytest.approx(metrics["samples_per_second"], rel=0.5)
        assert scalars["losses/total"][-1][1] < 0.8 * scalars["losses/total"][0][1]
        assert final["test/accuracy"] > 0.3  # chance is 0.1
        from transformers import pipeline

        picture = Image.fromarray(np.zeros((28, 28), np.uint8)).convert("RGB")
        answer = pipeline("image-classification", model=str(tmp_path / "run/model"))(picture)
        assert answer[0]["label"] in list("0123456789")


@pytest.mark.parametrize("n", [1999, 2000, 2001, 4001, 5994])
def test_the_probe_looks_everywhere_in_rows_that_are_sorted_by_class(sd, n):
    """As in a folder a class. Vectors that tell the class: any other labels than their own rows' would spoil the score."""
    labels = np.sort(np.arange(n) % 5)
    for name in ("further_pretrain_vit", "self_distill_vit", "further_pretrain_roberta", "self_distill_roberta"):
        scope = dict.fromkeys(("images", "texts", "labels"), labels) | {"np": np, "n": n, "probe": True}
        scope |= dict.fromkeys(("KNN_IMAGES", "KNN_TEXTS"), 2000)
        for line in map(str.strip, (ROOT / f"{name}.py").read_text().splitlines()):
            if line.startswith(("every = ", "fixed, every = ", "seen, labels = ")):  # what the main part looks at
                exec(line, scope)
        assert set(scope["seen"]) == set(range(5)) and 1000 <= len(scope["seen"]) <= 2000
        assert sd.knn_accuracy(torch.eye(5)[torch.from_numpy(scope["seen"])], scope["labels"]) == 1
        scope |= {"encode_all": lambda model, seen, *_: seen, "teacher_vectors": labels, "model": 0, "tokenizer": 0}
        scope |= {"autocast": 0, "args": SimpleNamespace(representation="cls")}
        lines = list(map(str.strip, (ROOT / f"{name}.py").read_text().splitlines()))
        apart = [line for line in lines if line.startswith("apart = encode_all(")]  # the distance left, on what the probe sees
        assert len(apart) == (name == "self_distill_roberta")
        for line in apart:
            exec(line, scope)
            assert not scope["apart"].any()


def test_validate_scores_on_a_part_of_train(run, tmp_path):
    flags = ("--steps", 4, "--eval-every", 2, "--validate", "--batch-size", 8)
    done = run("finetune", "--run-dir", tmp_path / "run", *flags)
    assert "180 images for training, 20 for eval, 10 classes" in done.stdout  # of 200, and the test's 1,000 stay unseen
    _, scalars = tags(tmp_path / "run")
    assert [step for step, _ in scalars["eval/accuracy"]] == [2, 4] and not any(tag.startswith("test/") for tag in scalars)


# ------------------------------------------------------------------------------------------------ data sets of the paper
def prepared_hub(hub, sd):
    """A model and a data set in the Hub's cache, with the names, files and columns of the real ones; random content."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

    repo = hub / "hub/models--facebook--vit-mae-base"
    snapshot = repo / "snapshots/0123456789012345678901234567890123456789"
    if snapshot.exists():
        return
    config = ViTMAEConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32,
                          decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
                          decoder_intermediate_size=32)  # fmt: skip
    ViTMAEForPreTraining(config).save_pretrained(snapshot)
    mean, std = IMAGENET
    ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean, image_std=std).save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(snapshot.name)

    bbox = datasets.Sequence(datasets.Value("float32"))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(200), bbox=bbox)
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(8):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(buffer := io.BytesIO(), "PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    files = {}
    for split, n in (("train", 5994), ("test", 5794)):
        rows = {"image": [pictures[i % 8] for i in range(n)], "label": [i % 200 for i in range(n)], "bbox": [[0, 0, 1, 1]] * n}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(hub / f"{split}.parquet")
        files[split] = [str(hub / f"{split}.parquet")]
    name = "bentrevett/caltech-ucsd-birds-200-2011"
    where = {"cache_dir": str(hub / "datasets"), "hash": "0123"}
    Parquet(dataset_name=name.split("/")[1], data_files=files, **where).download_and_prepare()
    folder = (hub / "datasets" / name.split("/")[1]).rename(hub / "datasets" / name.replace("/", "___"))
    next(folder.glob("default-*")).rename(folder / "default")


def test_cub_by_name_runs_the_papers_recipe_from_a_prepared_hub_cache(hub, run, sd, tmp_path):
    prepared_hub(hub, sd)
    run("self_distill_vit", "--dataset", "cub", "--rounds", 2, "--steps", 2, "--max-train-samples", 400, "--eval-every", 0,
        "--run-dir", tmp_path / "run")  # fmt: skip
    args = json.loads((tmp_path / "run/metrics.json").read_text())["args"]
    assert (args["model"], args["batch_size"]) == ("facebook/vit-mae-base", 64)
    assert (args["learning_rate"], args["weight_decay"], args["warmup_ratio"]) == (1.5e-4, 0.01, 0.0)
    assert sd.RECIPES["paper"]["steps"] == 20_000
    assert {"round_0", "round_1", "round_2", "model"} < {p.name for p in (tmp_path / "run").iterdir()}
    run("finetune", "--dataset", "cub", "--model", tmp_path / "run/model", "--steps", 2, "--run-dir", tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned/model/config.json").read_text())
    assert len(config["id2label"]) == 200 and config["image_size"] == 32


# ------------------------------------------------------------------------------------------------ the user's own images
def image_folder(path, classes=("a", "b"), n=12, mode="RGB"):
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)).convert(mode).save(path / name / f"{i}.png")
    return path


def test_own_folder_with_classes_gets_a_stratified_test_split(script, tmp_path, capsys):
    ft = script("finetune")
    data, names = images_of(ft, ft.Args(dataset=str(image_folder(tmp_path / "photos", n=20))), 32)
    assert names == ["a", "b"] and "has no test split" in capsys.readouterr().out
    assert [len(images) for images, _ in data.values()] == [36, 4] and list(np.bincount(data["test"][1])) == [2, 2]
    again, _ = images_of(script("further_pretrain_vit"), ft.Args(dataset=str(tmp_path / "photos"), seed=7), 32)
    assert all(np.array_equal(a, b) for a, b in zip(again["test"][0], data["test"][0], strict=True))  # the same in each stage


def test_flat_unlabelled_folder_is_enough_for_pretraining(run, tmp_path):
    image_folder(tmp_path / "photos", classes=("",), n=20)
    flags = ("--dataset", tmp_path / "photos", "--model", TINY, "--steps", 2, "--run-dir", tmp_path / "run")
    done = run("self_distill_vit", *flags)
    assert (tmp_path / "run/model").exists()
    assert "--dataset path/to/labelled" in done.stdout.strip().splitlines()[-1]  # these could not be fine-tuned on


def folders_without_splits(kind, path):
    """(classes, images for training, what is printed) of a folder in which load_dataset would see a split that is none."""
    if kind == "files named like splits":
        image_folder(path, classes=("",), n=20)
        for name in ("test.jpg", "train ride.jpg", "blood-test.jpg"):
            (path / "0.png").rename(path / name) if name == "test.jpg" else shutil.copy(path / "1.png", path / name)
        return [], 22, "d has no column of labels (--label-column): all of it is trained on, nothing is held out for a test"
    if kind == "not images":
        image_folder(path, classes=("",), n=20)
        (path / "notes.md").write_text("of a walk")
        return [], 20, "d: 1 of its 21 files are not read"
    image_folder(path, classes=("blood test", "cars"), n=20)
    return ["blood test", "cars"], 36, "d has no test split: 4 samples of train, stratified, are held out as one"


@pytest.mark.parametrize("kind", ["files named like splits", "not images", "a class named like a split"])
def test_a_folder_without_splits_is_read_whole(fp, tmp_path, capsys, kind):
    names, n, said = folders_without_splits(kind, tmp_path / "d")
    data, found = images_of(fp, fp.Args(dataset=str(tmp_path / "d")), 16, ("train",))
    assert (found, len(data["train"][0])) == (names, n) and said in capsys.readouterr().out


def test_grey_palette_rgba_cmyk_16_bit_and_rotated_images(sd, tmp_path):
    (tmp_path / "odd").mkdir()
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))  # dark on the left, bright on the right
    for mode, ending in (("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("RGB", "jpg")):
        Image.fromarray(ramp).convert("RGB").convert(mode).save(tmp_path / f"odd/{mode}.{ending}")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "odd/sixteen.png")
    turned = Image.fromarray(ramp).convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # "rotate by 90 degrees to look at it"
    turned.save(tmp_path / "odd/turned.jpg", exif=exif)
    data, _ = images_of(sd, sd.Args(dataset=str(tmp_path / "odd")), 32)
    images, labels = data["train"]
    assert len(images) == 7 and labels is None
    for image in images:
        assert image[:, :, 0].mean() < 20 and image[:, :, -1].mean() > 235, image[0, 0]


# ------------------------------------------------------------------------------------------------ bad input
def broken(path):
    image_folder(path, classes=("a", "b"), n=2)
    (path / "a/bad.png").write_bytes((path / "a/0.png").read_bytes()[:60])
    return path


def folder_model(path, **config):
    from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
             "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}  # fmt: skip
    ViTMAEForPreTraining(ViTMAEConfig(**small | config)).save_pretrained(path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def darker(path, key="image_mean"):
    shutil.copytree(TINY, path)
    processor = json.loads((path / "preprocessor_config.json").read_text()) | {key: [0.9] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def no_weights(path):
    path.mkdir()
    (path / "config.json").write_text((TINY / "config.json").read_text())
    return path


def another_model(path):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(config).save_pretrained(path)
    return path


def empty(path):
    path.mkdir()
    return path


def uneven(path):
    folder_model(path)
    config = json.loads((path / "config.json").read_text()) | {"image_size": 36}
    (path / "config.json").write_text(json.dumps(config))
    return path


BAD = {
    "unknown dataset": ("further_pretrain_vit", lambda p: ("--dataset", "cubs"), "unknown dataset cubs: give mnist5k, "
                        "aircraft, cub, chest_xray, dtd, dogs, flowers, cifar100, a folder, a file, or a Hub id (owner/name)"),
    "empty folder": ("further_pretrain_vit", lambda p: ("--dataset", empty(p / "d"), "--model", TINY),
                     "cannot load {p}/d: * {data}"),
    "bad image": ("self_distill_vit", lambda p: ("--dataset", broken(p / "d"), "--model", TINY),
                  "cannot load {p}/d: cannot decode image {p}/d/a/bad.png (row *): * (mend or remove it)"),
    "no weights": ("self_distill_vit", lambda p: ("--model", no_weights(p / "m")), "cannot load model {p}/m: * {vit}"),
    "bert": ("further_pretrain_vit", lambda p: ("--model", another_model(p / "m")),
             "{p}/m is a bert model: a vit_mae one, encoder and decoder, is needed"),
    "bert to finetune": ("finetune", lambda p: ("--model", another_model(p / "m")),
                         "{p}/m, a bert model, is taken to read texts (vit_mae and vit read images): mnist5k has none"),
    "teacher's shape": ("self_distill_vit", lambda p: ("--teacher", folder_model(p / "m")),
                        "--teacher {p}/m has another shape or mean of pixels than --model {TINY}: give one of its kind"),
    "teacher's pixels": ("self_distill_vit", lambda p: ("--teacher", darker(p / "m")),
                         "--teacher {p}/m has another shape or mean of pixels than --model {TINY}: give one of its kind"),
    "teacher's contrast": ("self_distill_vit", lambda p: ("--teacher", darker(p / "m", "image_std")),
                           "--teacher {p}/m has another shape or mean of pixels than --model {TINY}: give one of its kind"),
    "patch size": ("further_pretrain_vit", lambda p: ("--model", uneven(p / "m")),
                   "{p}/m: patches of 16 pixels do not divide an image of 36"),
    "no hub, model": ("further_pretrain_vit", lambda p: ("--model", "some/model"), "cannot load model some/model: * {vit}"),
    "no hub, data": ("further_pretrain_vit", lambda p: ("--dataset", "some/data", "--model", TINY),
                     "cannot load some/data: * {data}"),
    "one class": ("finetune", lambda p: ("--dataset", image_folder(p / "d", ("a",)), "--model", TINY),
                  "{p}/d has 0 classes: {labelled}"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line_and_leaves_nothing(zygote, tmp_path, case):
    name, flags, line = BAD[case]
    flags = flags(tmp_path)
    code, _, said = zygote(name, tmp_path / "run", dict(zip(flags[::2], flags[1::2], strict=True)))
    errors = [x for x in said.splitlines() if x.startswith("error: ")]
    assert code == 2 and len(errors) == 1, said
    is_the_line(errors[0], line, p=tmp_path, TINY=TINY)
    assert said.rstrip().endswith(errors[0]) and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_existing_run_directory_is_not_touched(zygote, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("precious")
    code, _, said = zygote("further_pretrain_vit", tmp_path / "run", {})
    assert code == 2 and said.endswith(f"error: {tmp_path}/run exists: go on with it by --resume, or give another --run-dir\n")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["further_pretrain_vit", "self_distill_vit"])
def test_auto_compiles_long_rounds_on_one_gpu_that_has_what_triton_needs(name):
    """The lines themselves, on machines that are made up: there is no GPU here."""
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    rule = "\n".join(line.strip() for line in lines if line.startswith(("    pays =", "    header =", "    able =")))
    asked = next(line for line in lines if "if args.compile ==" in line).strip().split("if ", 1)[1].split(":  #")[0]
    good = {
        "compile": "auto",
        "graphed": True,
        "steps": 5000,
        "capability": (8, 0),
        "cc": "gcc",
        "header": True,
        "os": "linux",
    }
    bad = {"compile": "off", "graphed": False, "steps": 4999, "capability": (7, 5), "cc": None, "header": False, "os": "win32"}
    for change in (None, *bad):
        for forced in (False, True):
            at = good | ({change: bad[change]} if change else {}) | ({"compile": "on"} if forced else {})
            world = {
                "graphed": at["graphed"], "args": SimpleNamespace(compile=at["compile"], steps=at["steps"]), "device": None,
                "torch": SimpleNamespace(cuda=SimpleNamespace(get_device_capability=lambda _, at=at: at["capability"])),
                "shutil": SimpleNamespace(which=lambda _, at=at: at["cc"]), "sys": SimpleNamespace(platform=at["os"]),
                "sysconfig": SimpleNamespace(get_path=lambda _: ""),
                "Path": lambda *_, at=at: SimpleNamespace(exists=lambda: at["header"]),
            }  # fmt: skip
            exec(rule, world)
            assert bool(eval(asked, world)) == (forced or change is None), (change, forced)
