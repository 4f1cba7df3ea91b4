"""RecAdam, MARS and R3F against slow versions, and the studies' flags: each changes exactly what it names."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT

VIT, ROBERTA = ROOT / "pretrained/vit-mae-tiny", ROOT / "pretrained/roberta-tiny"
FP32 = torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def ft(script):
    return script("finetune")


class Linear(torch.nn.Module):
    """A classifier in the shape that `update` expects: inputs by name, logits out; `head` is its new layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.head(self.body(x).tanh()))


def ready(ft, steps=6, **flags):
    """Model, arguments, anchors and a fresh batch for each step."""
    model = Linear()
    given = {"learning_rate": 0.01, "warmup_ratio": 0.0, "max_grad_norm": 1e9, "weight_decay": 0.0} | flags
    args = ft.Args(recadam_midpoint=3, recadam_strength=20.0, **given)
    anchors = [(p, p.detach().clone(), name.startswith("head")) for name, p in model.named_parameters()]
    g = torch.Generator().manual_seed(1)
    batches = [({"x": torch.randn(5, 6, generator=g)}, torch.randint(0, 3, (5,), generator=g)) for _ in range(steps)]
    return model, args, anchors, batches


def train(ft, model, args, anchors, batches):
    optimizer, scheduler = ft.optimizer_and_schedule(model, args, 10, (0.9, 0.999))
    for step, (inputs, targets) in enumerate(batches):
        ft.update(model, optimizer, scheduler, inputs, targets, FP32, anchors, step + 1, len(targets), args)
    return [p.detach().clone() for p in model.parameters()]


def test_recadam_is_its_published_formula_number_by_number(ft):
    model, args, anchors, batches = ready(ft, method="recadam", recadam_k=1.5)
    found = train(ft, model, args, anchors, batches)
    slow = Linear().double()
    start = {name: p.detach().clone() for name, p in slow.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in slow.named_parameters()} for _ in range(2))
    for t, (inputs, targets) in enumerate(batches, 1):
        slow.zero_grad()
        torch.nn.functional.cross_entropy(slow(inputs["x"].double()).logits, targets).backward()
        rate, weight = 0.01 * (10 - (t - 1)) / 10, 1 / (1 + math.exp(-1.5 * (t - 3)))
        for name, p in slow.named_parameters():
            for index in np.ndindex(*p.shape):  # one number at a time
                grad, old = p.grad[index].item(), p.data[index].item()
                m[name][index] = 0.9 * m[name][index] + 0.1 * grad
                v[name][index] = 0.999 * v[name][index] + 0.001 * grad**2
                step = m[name][index].item() / (1 - 0.9**t) / (math.sqrt(v[name][index].item() / (1 - 0.999**t)) + 1e-8)
                if name.startswith("head"):
                    p.data[index] = old - rate * step
                else:
                    p.data[index] = old - rate * (weight * step + (1 - weight) * 20.0 * (old - start[name][index].item()))
    for a, b in zip(found, slow.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b.data, rtol=0, atol=1e-6)


def test_gradients_are_cut_to_a_length_and_by_0_to_none(ft):
    free, whole, cut = (train(ft, *ready(ft, max_grad_norm=length)) for length in (1e9, 0.0, 0.01))
    assert all(torch.equal(a, b) for a, b in zip(free, whole, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(free, cut, strict=True))


def test_recadam_without_pull_is_adamw_and_before_its_midpoint_holds_the_weights(ft):
    plain = train(ft, *ready(ft, weight_decay=0.1))
    free = train(ft, *free_of_pull(ft))
    for a, b in zip(plain, free, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    model, args, anchors, batches = ready(ft, method="recadam", recadam_k=50.0)
    args.recadam_midpoint = 100
    train(ft, model, args, anchors, batches)
    assert all(torch.equal(p, start) for p, start, new in anchors if not new)
    assert all(not torch.equal(p, start) for p, start, new in anchors if new)


def free_of_pull(ft):
    _, args, _, batches = ready(ft, weight_decay=0.1, method="recadam", recadam_k=1e6)
    args.recadam_midpoint = 0
    model = Linear()
    return model, args, [(p, p.detach().clone(), name.startswith("head")) for name, p in model.named_parameters()], batches


def test_mars_keeps_every_row_within_its_radius_and_leaves_the_others_alone(ft):
    model, args, anchors, batches = ready(ft, method="mars", mars_gamma=0.07, mars_head_gamma=0.03)
    plain = train(ft, *ready(ft, steps=1))
    found = train(ft, model, args, anchors, batches[:1])
    inside = outside = 0
    for p, q, (_, start, new) in zip(found, plain, anchors, strict=True):
        gamma = 0.03 if new else 0.07
        for row in range(len(p) if p.ndim == 2 else 0):
            total = sum(abs(float(a) - float(b)) for a, b in zip(q[row], start[row], strict=True))
            if total <= gamma:
                inside += 1
                assert torch.equal(p[row], q[row])
            else:
                outside += 1
                expected = start[row] + (q[row] - start[row]) * gamma / total
                torch.testing.assert_close(p[row], expected, rtol=0, atol=1e-6)
        if p.ndim == 1:
            assert torch.equal(p, q)  # no bias is projected
    assert inside > 0 and outside > 0
    train(ft, model, args, anchors, batches)
    for p, start, new in anchors:
        if p.ndim == 2:
            assert (p - start).abs().sum(1).max() <= (0.03 if new else 0.07) + 1e-6
    model, args, anchors, batches = ready(ft, method="mars", mars_gamma=1e6, mars_head_gamma=1e6)
    assert all(torch.equal(a, b) for a, b in zip(train(ft, model, args, anchors, batches), train(ft, *ready(ft)), strict=True))


def test_mars_takes_a_convolution_as_one_row_an_output_channel(ft):
    start = torch.zeros(2, 3, 4, 4)
    p = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), -0.001)])  # sums 4.8 and 0.048
    moved = p.clone()
    ft.mars([(moved, start, False)], ft.Args(mars_gamma=2.4))
    torch.testing.assert_close(moved[0], p[0] / 2)
    assert torch.equal(moved[1], p[1])
    table = torch.full((1, 5, 8), 9.0)  # positions are no weight matrix
    ft.mars([(table, torch.zeros(1, 5, 8), False)], ft.Args(mars_gamma=2.4))
    assert (table == 9).all()


def test_r3f_is_a_hand_written_divergence_with_a_gradient_through_both_and_zero_at_zero_noise(ft, hub):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(ROBERTA, num_labels=3).float().eval()  # no dropout
    ids = torch.randint(5, 1000, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = model(**inputs).logits
    assert ft.r3f(model, inputs, logits, ft.Args(r3f_eps=0.0)).abs() < 1e-6
    for kind in ("uniform", "normal"):
        args = ft.Args(r3f_eps=0.5, r3f_noise=kind)
        torch.manual_seed(3)
        found = ft.r3f(model, inputs, model(**inputs).logits, args)
        found.backward()
        gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        torch.manual_seed(3)
        embeddings = model.roberta.embeddings.word_embeddings(ids).detach()
        noise = torch.empty_like(embeddings)
        noise = noise.uniform_(-0.5, 0.5) if kind == "uniform" else noise.normal_(0, 0.5)
        assert noise.abs().max() <= 0.5 or kind == "normal"
        q = model(inputs_embeds=embeddings + noise, attention_mask=inputs["attention_mask"]).logits.double().softmax(-1)
        p = model(**inputs).logits.double().softmax(-1)
        slow = sum((p[b] * (p[b] / q[b]).log()).sum() + (q[b] * (q[b] / p[b]).log()).sum() for b in range(4))
        torch.testing.assert_close(found.double(), slow, rtol=0, atol=1e-6)
        assert found > 1e-3
        slow.backward()
        for name, parameter in model.named_parameters():
            if name in gradient:
                torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
        model.zero_grad()


def test_r3f_noises_the_patch_embeddings_of_images(ft, hub):
    from transformers import AutoConfig

    model, _, new = ft.load_model(str(VIT), AutoConfig.from_pretrained(VIT), ["a", "b"], 0.0)
    assert new == ["classifier.bias", "classifier.weight"]
    pixels = torch.randn(3, 3, 64, 64)
    logits = model.eval()(pixel_values=pixels).logits
    seen = []
    hook = model.vit.embeddings.patch_embeddings.register_forward_hook(lambda module, _, out: seen.append(out.shape))
    assert ft.r3f(model, {"pixel_values": pixels}, logits, ft.Args(r3f_eps=0.0)).abs() < 1e-6
    assert ft.r3f(model, {"pixel_values": pixels}, logits, ft.Args(r3f_eps=1.0)) > 1e-6
    hook.remove()
    assert seen == [(3, 64, 192)] * 2


def test_r3f_noises_the_embeddings_of_an_encoder_with_a_decoder(ft, hub):
    """BART holds a third table that it shares with both, and never calls."""
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    model = BartForSequenceClassification(BartConfig(vocab_size=60, **shape)).eval()
    inputs = {"input_ids": torch.tensor([[0, 5, 6, 2], [0, 9, 8, 2]]), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)  # so that the encoder is heard through the decoder
        logits = model(**inputs).logits
        assert ft.r3f(model, inputs, logits, ft.Args(r3f_eps=0.0)).abs() < 1e-6
        assert ft.r3f(model, inputs, logits, ft.Args(r3f_eps=1.0)) > 2e-5


@pytest.mark.slow
def test_r3f_sees_the_noise_in_a_compiled_model(ft, hub):
    """The compiler does not look whether a hook has come since: what is hooked may not be in a graph, layers alone are."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      image_size=16, patch_size=8, num_labels=4)  # fmt: skip
    model = ViTForImageClassification(shape).eval()
    inputs, args = {"pixel_values": torch.randn(2, 3, 16, 16)}, ft.Args(r3f_eps=1.0)
    for part in [part for part in model.modules() if isinstance(part, torch.nn.ModuleList)]:
        [layer.compile() for layer in part]
    assert ft.r3f(model, inputs, model(**inputs).logits, args) > 1e-6


LEARN = [("recadam", "mnist5k"), ("mars", "docstrings"), ("r3f", "docstrings")]
REST = [("recadam", "docstrings"), ("mars", "mnist5k"), ("r3f", "mnist5k")]


@pytest.mark.parametrize(("method", "dataset"), LEARN + [pytest.param(*case, marks=pytest.mark.slow) for case in REST])
def test_each_baseline_learns(run, tmp_path, method, dataset):
    length = ("--steps", 45 if method == "recadam" else 80) if dataset == "mnist5k" else ("--epochs", 4)
    if method == "mars":  # a radius that the weights reach in so short a run
        length = (*length, "--mars-gamma", 1.0, "--mars-head-gamma", 1.0)
    flags = ("--dataset", dataset, "--method", method, "--run-dir", tmp_path / "run", *length, "--log-every", 5)
    assert "(a small run: a tiny model, few labels)" in run("finetune", *flags).stdout
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["args"]["method"] == method
    assert metrics["final"]["test/accuracy"] > (0.3 if dataset == "mnist5k" else 0.18)  # chance is 0.1 and 0.125
    assert metrics["final"]["charts/distance_from_init"] > 0
    assert ("losses/r3f" in metrics["final"]) == (method == "r3f")
    if method == "mars":
        from transformers import AutoModelForSequenceClassification, ViTForImageClassification

        images = dataset == "mnist5k"
        kind, tiny = (ViTForImageClassification, VIT) if images else (AutoModelForSequenceClassification, ROBERTA)
        start, end = (kind.from_pretrained(path).float().base_model.state_dict() for path in (tiny, tmp_path / "run/model"))
        sums = [(end[key] - start[key]).flatten(1).abs().sum(1).max() for key in end if end[key].ndim in (2, 4)]
        assert 0.999 < max(sums) < 1.001


# ------------------------------------------------------------------------------------------------ the studies' flags
def test_representation_is_the_cls_vector_or_the_mean_of_the_others(script, hub):
    vit, text = script("self_distill_vit"), script("self_distill_roberta")
    model, _ = vit.load_model(str(VIT), 0.75, torch.device("cpu"))
    model.eval()
    pixels = torch.randn(2, 3, 64, 64)
    model.vit.config.mask_ratio = 0.0
    hidden = model.vit(pixels, noise=torch.arange(64).repeat(2, 1)).last_hidden_state
    torch.testing.assert_close(vit.encode(model.vit, pixels), hidden[:, 0])
    torch.testing.assert_close(vit.encode(model.vit, pixels, "mean"), hidden[:, 1:].mean(1))
    model, tokenizer = text.load_model(str(ROBERTA))
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # see docs/speed.md
    model.eval()
    texts = [np.array([0, 50, 60, 70, 2]), np.array([0, 80, 2])]
    found = text.encode(model, text.collate(texts, [0, 1], tokenizer, "cpu"), "mean")
    for ids, vector in zip(texts, found, strict=True):  # one at a time, so with no padding
        alone = model.base_model(torch.from_numpy(ids)[None]).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["self_distill_vit", "self_distill_roberta"])
def test_student_init_decides_where_a_round_starts(run, tmp_path, name):
    flags = ("--steps", 3, "--batch-size", 8, "--max-train-samples", 100, "--eval-every", 0, "--log-every", 1)
    if name == "self_distill_roberta":  # without dropout, with which not even the teacher agrees with itself
        shutil.copytree(ROBERTA, tmp_path / "model")
        values = json.loads((tmp_path / "model/config.json").read_text())
        values |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        (tmp_path / "model/config.json").write_text(json.dumps(values))
        flags = ("--model", tmp_path / "model", "--epochs", 1, "--max-train-samples", 24, *flags[2:4], *flags[6:])
    moved = {}
    for init in ("pretrained", "teacher"):
        run(name, "--run-dir", tmp_path / init, *flags, "--student-init", init, "--warmup-ratio", 1.0)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / init)).Reload()
        moved[init] = {e.step: e.value for e in events.Scalars("charts/distance_from_init")}
        distill = {e.step: e.value for e in events.Scalars("losses/distill")}
        assert (distill[4] < 1e-8) == (init == "teacher")  # at its first step the student still is the teacher
    given = (*flags, "--student-init", "teacher", "--teacher", tmp_path / "pretrained/round_0")
    run(name, "--run-dir", tmp_path / "given", *given, "--warmup-ratio", 1.0)
    assert {e.step: e.value for e in EventAccumulator(str(tmp_path / "given")).Reload().Scalars("losses/distill")}[1] < 1e-8
    assert moved["pretrained"][3] == moved["teacher"][3]
    assert moved["teacher"][4] > 0.9 * moved["teacher"][3] and moved["pretrained"][4] < 0.5 * moved["pretrained"][3]


@pytest.mark.parametrize(("counts", "size"), [((19, 1), 10), ((10, 10), 19), ((10, 10), 10)])
def test_it_is_said_when_fewer_samples_are_not_stratified(script, capsys, counts, size):
    """A class has one sample; or one sample would remain for two classes."""
    labels = np.repeat([0, 1], counts)
    (chosen, drawn), _ = script("finetune").split_rows(list(range(20)), labels, seed=1, train_size=size)
    assert len(chosen) == len(drawn) == size and list(labels[chosen]) == list(drawn)
    said = capsys.readouterr().out
    assert said.startswith("--max-train-samples: not stratified, ") if size == 19 or 1 in counts else not said
    script("finetune").split_rows(list(range(20)), None, seed=1, train_size=size)  # there is nothing to stratify by
    assert not capsys.readouterr().out
    assert size == 19 or 1 in counts or list(np.bincount(drawn)) == [5, 5]


def test_fewer_samples_are_stratified_seeded_and_the_same_in_both_stages(script, hub):
    from conftest import images_of

    labels = {}
    for name in ("further_pretrain_vit", "finetune"):
        module = script(name)
        for seed in (1, 2):
            args = module.Args(max_train_samples=50, seed=seed)
            images, labels[name, seed] = images_of(module, args, 28)[0]["train"]
            assert len(images) == 50 and set(np.bincount(labels[name, seed])) == {5}
            labels[name, seed] = np.concatenate([labels[name, seed], [int(image.sum()) for image in images]])
    assert np.array_equal(labels["further_pretrain_vit", 1], labels["finetune", 1])
    assert not np.array_equal(labels["finetune", 1], labels["finetune", 2])
