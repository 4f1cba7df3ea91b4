"""Whole runs against slow versions written here: order of the data, masks, dropout, optimizer, schedule, rounds, curves.

What a script does in several rounds of several steps is done again from the files alone, with the library's models and
loops; no function of the scripts is called. It also pins what a seed means: a change of the draws does not go unnoticed.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_roberta import WORDS, config, word_tokenizer
from torch.nn.functional import cross_entropy

SEED, RATE, DECAY = 3, 1e-3, 0.3


def adamw(model, betas, eps=1e-8, clip=float("inf")):
    """step(rate) -> norm of the gradients: AdamW as its paper writes it, no decay of parameters with one dimension."""
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second, number = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained], [0]

    @torch.no_grad()
    def step(rate):
        number[0] += 1
        norm = sum(p.grad.double().pow(2).sum() for p in trained if p.grad is not None).sqrt().item()
        for p, m, v in zip(trained, first, second, strict=True):
            if p.grad is None:  # BERT's pooler and what else no loss reaches
                continue
            gradient, p.grad = p.grad * min(1, clip / norm), None
            m.copy_(betas[0] * m + (1 - betas[0]) * gradient)
            v.copy_(betas[1] * v + (1 - betas[1]) * gradient**2)
            if p.ndim > 1:
                p -= rate * DECAY * p
            p -= rate * m / (1 - betas[0] ** number[0]) / ((v / (1 - betas[1] ** number[0])).sqrt() + eps)
        return norm

    return step


def rates(steps, warmup):
    """Of each step: up from 0 in the first `warmup`, then down to what would be 0 at the next."""
    return [RATE * (i / warmup if i < warmup else (steps - i) / (steps - warmup)) for i in range(steps)]


def moved(model, start):
    """L2 distance of two models' weights, but for the keys' biases: softmax does not see them, their gradient is rounding."""
    pairs = [(p, q) for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True)
             if not name.endswith(("key.bias", "k_proj.bias"))]  # fmt: skip
    return sum((p - q).double().pow(2).sum() for p, q in pairs).sqrt().item()


def agree(run_dir, curves, found, slow, start):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for one, two in zip(found, slow, strict=True):
        assert moved(one, two) < 1e-4 * moved(two, start) > 0  # 1e-5 is seen: fp32, other order of sums
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    for tag, values in curves.items():
        assert logged[tag] == pytest.approx(values, rel=1e-3), tag
    return logged


def log(curves, step, **values):
    for tag, value in values.items():
        curves.setdefault(tag.replace("__", "/"), {})[step] = float(torch.as_tensor(value).detach())


# ------------------------------------------------------------------------------------------------ images
def write_images(folder, names, seed=0):
    """Smooth random images of 96 x 80; the pixels (N, 3, 64, 64) as the model gets them, squashed to a square."""
    rng, pixels = np.random.default_rng(seed), []
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
        image.save(folder / name)
        image = image.resize((64, 64), Image.Resampling.BILINEAR)
        pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (torch.stack(pixels) - mean) / deviation


def image_model(folder):
    """Random weights; from a configuration alone the position tables would be zero."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    shape |= {f"decoder_{key}": value for key, value in shape.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(image_size=64, patch_size=8, initializer_range=0.1, **shape))
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    shutil.copy(ROOT / "pretrained/vit-mae-tiny/preprocessor_config.json", folder)
    return folder


def mae(folder):
    """With half of the patches hidden. The position tables are not trained."""
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained(folder, mask_ratio=0.5, norm_pix_loss=True).float()
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return model


def whole(model, pixels, representation):
    """Vectors (B, D) of whole images, by the library's own forward."""
    model.config.mask_ratio = model.vit.config.mask_ratio = 0.0
    hidden = model.vit(pixels, noise=torch.arange(64.0).expand(len(pixels), -1)).last_hidden_state
    model.config.mask_ratio = model.vit.config.mask_ratio = 0.5
    return hidden[:, 0] if representation == "cls" else hidden[:, 1:].mean(1)


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_self_distillation_of_images(zygote, tmp_path, representation):
    pixels, steps, size = write_images(tmp_path / "images", [f"{i}.png" for i in range(7)]), 4, 5
    folder = image_model(tmp_path / "model")
    flags = {"--dataset": tmp_path / "images", "--model": folder, "--seed": SEED, "--steps": steps, "--rounds": 2,
             "--batch-size": size, "--learning-rate": RATE, "--weight-decay": DECAY, "--warmup-ratio": 0.25,
             "--mask-ratio": 0.5, "--reconstruction-coef": 0.5, "--distill-coef": 2, "--representation": representation,
             "--log-every": 1, "--eval-every": 3}  # fmt: skip
    code, _, said = zygote("self_distill_vit", tmp_path / "run", flags)
    assert code == 0, said
    start, teacher, curves, rounds = mae(folder), None, {}, []
    for t in range(3):
        student = mae(folder).train()
        step = adamw(student, (0.9, 0.95))
        order = np.concatenate([np.random.default_rng([SEED, t, 0, epoch]).permutation(7) for epoch in range(3)])
        for i, rate in enumerate(rates(steps, 1)):
            batch = pixels[order[i * size : (i + 1) * size]]
            noise = torch.from_numpy(np.random.default_rng([SEED, t, 1, i]).random((size, 64), np.float32))
            total = reconstruction = student(batch, noise=noise).loss
            done = t * steps + i + 1
            if teacher:
                with torch.no_grad():
                    target, everywhere = (whole(teacher, x, representation) for x in (batch, pixels))
                distill = (whole(student, batch, representation) - target).pow(2).sum() / size
                total = 0.5 * reconstruction + 2 * distill
                spread = (everywhere - everywhere.mean(0)).pow(2).sum() / 7
                log(curves, done, losses__distill=distill, charts__distill_unexplained=distill / spread)
            total.backward()
            log(curves, done, losses__reconstruction=reconstruction, losses__total=total, charts__grad_norm=step(rate),
                charts__distance_from_init=moved(student.vit, start.vit), charts__learning_rate=rate)  # fmt: skip
        rounds.append(teacher := student)
    found = [mae(tmp_path / f"run/round_{t}") for t in range(3)]
    logged = agree(tmp_path / "run", curves, found, rounds, start)
    assert logged.keys() == {*curves, "charts/samples_per_second"}  # no labels, no probe


# ------------------------------------------------------------------------------------------------ texts
def write_texts(path, n, seed=0, places=40):
    """n texts of 3 to 20 words, and one that is longer than the model takes; their ids, in `places` at most."""
    rng = np.random.default_rng(seed)
    words = [rng.integers(0, len(WORDS), 60 if i == n // 2 else rng.integers(3, 21)) for i in range(n)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(WORDS[w] for w in text) + "\n" for text in words))
    return [[0, *(6 + text[: places - 2]).tolist(), 2] for text in words]  # <s>, words, </s>


def language_model(folder):
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config("roberta")).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def padded(texts):
    ids = torch.full((len(texts), max(map(len, texts))), 1)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    return ids, (ids != 1).long()


def batches(texts, t, epochs, size):
    """Row numbers: random; those that fill batches sorted by length, each off by up to a tenth; in batches, shuffled again."""
    out = []
    for epoch in range(epochs):
        rng = np.random.default_rng([SEED, t, 0, epoch])
        rows = rng.permutation(len(texts)).tolist()
        few, rows = rows[: len(rows) % size], rows[len(rows) % size :]
        about = {row: len(texts[row]) * factor for row, factor in zip(rows, rng.uniform(0.9, 1.1, len(rows)), strict=True)}
        rows = sorted(rows, key=about.get)
        rows = [few] * bool(few) + [rows[i : i + size] for i in range(0, len(rows), size)]
        out += [rows[i] for i in rng.permutation(len(rows))]
    return out


def masked(ids, share, rng):
    """A masked copy, and the places to predict: each token of 5 and up with probability `share`; then 80, 10 and 10 %."""
    chosen, how, other = rng.random(ids.shape) < share, rng.random(ids.shape), rng.choice(np.arange(5, 96), ids.shape)
    copy, where = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    for b in range(len(ids)):
        for k in range(ids.shape[1]):
            if ids[b, k] >= 5 and chosen[b, k]:
                where[b, k] = True
                copy[b, k] = 4 if how[b, k] < 0.8 else int(other[b, k]) if how[b, k] >= 0.9 else ids[b, k]
    return copy, where


def vectors(model, texts, representation):
    """(B, D) of unmasked texts, padded together, by the library's own forward."""
    ids, attention = padded(texts)
    hidden = model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state
    if representation == "cls":
        return hidden[:, 0]
    return torch.stack([h[: len(text)].mean(0) for h, text in zip(hidden, texts, strict=True)])


@pytest.mark.parametrize("representation", ["cls", "mean"])
def test_self_distillation_of_texts(zygote, tmp_path, representation):
    from transformers import AutoModelForMaskedLM

    texts, folder, size = write_texts(tmp_path / "texts.txt", 11, places=30), language_model(tmp_path / "model"), 4
    flags = {"--dataset": tmp_path / "texts.txt", "--model": folder, "--seed": SEED, "--epochs": 2, "--rounds": 2,
             "--batch-size": size, "--learning-rate": RATE, "--weight-decay": DECAY, "--warmup-ratio": 0.34,
             "--mlm-probability": 0.3, "--reconstruction-coef": 0.5, "--distill-coef": 2, "--representation": representation,
             "--max-length": 30, "--log-every": 1, "--eval-every": 4}  # fmt: skip
    code, _, said = zygote("self_distill_roberta", tmp_path / "run", flags)
    assert code == 0, said
    start, teacher, curves, rounds = AutoModelForMaskedLM.from_pretrained(folder), None, {}, []
    for t in range(3):
        student = AutoModelForMaskedLM.from_pretrained(folder).train()  # with its dropout
        step, order = adamw(student, (0.9, 0.98), 1e-6), batches(texts, t, 2, size)
        for i, rate in enumerate(rates(6, 2)):
            batch, done, rng = [texts[row] for row in order[i]], t * 6 + i + 1, np.random.default_rng([SEED, t, 1, i])
            torch.manual_seed(int(rng.integers(2**62)))
            ids, attention = padded(batch)
            copy, where = masked(ids, 0.3, rng)
            logits = student(input_ids=copy, attention_mask=attention).logits  # at all places
            total = mlm = cross_entropy(logits[where], ids[where])
            if teacher:
                with torch.no_grad():
                    target, everywhere = (
                        torch.cat([vectors(teacher, [x], representation) for x in xs]) for xs in (batch, texts))  # fmt: skip
                distill = (vectors(student, batch, representation) - target).pow(2).sum() / len(batch)
                total = 0.5 * mlm + 2 * distill
                log(curves, done, losses__distill=distill)
            total.backward()
            log(curves, done, losses__mlm=mlm, losses__total=total, charts__grad_norm=step(rate),
                charts__distance_from_init=moved(student.roberta, start.roberta), charts__learning_rate=rate)  # fmt: skip
            if teacher and (done % 4 == 0 or i == 5):  # on the way, without dropout
                with torch.no_grad():
                    apart = torch.cat([vectors(student.eval(), [x], representation) for x in texts]) - everywhere
                student.train()
                spread = (everywhere - everywhere.mean(0)).pow(2).sum()
                log(curves, done, charts__distill_unexplained=apart.pow(2).sum() / spread)
        rounds.append(teacher := student.eval())
    found = [AutoModelForMaskedLM.from_pretrained(tmp_path / f"run/round_{t}") for t in range(3)]
    logged = agree(tmp_path / "run", curves, found, rounds, start)
    assert logged.keys() == {*curves, "charts/samples_per_second", "eval/masked_accuracy"}


# ------------------------------------------------------------------------------------------------ fine-tuning
LAST = 2**31  # its number in seeds, where a round of pre-training has its own
TUNED = {"--seed": SEED, "--batch-size": 4, "--learning-rate": RATE, "--weight-decay": DECAY, "--warmup-ratio": 0.34,
         "--max-grad-norm": 0.5, "--log-every": 1, "--eval-every": 2}  # fmt: skip


def tune(start, model, order, inputs, labels, betas, eps, method="finetune"):
    """The curves of fine-tuning `model`, which is changed in place. inputs: (rows, generator of the step) -> its arguments."""
    step, curves = adamw(model, betas, eps, clip=0.5), {}
    for i, rate in enumerate(rates(len(order), int(0.34 * len(order)))):
        rng = np.random.default_rng([SEED, LAST, 1, i])
        torch.manual_seed(int(rng.integers(2**62)))
        batch = inputs(order[i], rng)
        logits = model(**batch).logits
        loss = cross_entropy(logits, labels[order[i]])
        if method == "r3f":  # the divergence from the predictions on noised embeddings, both ways
            embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
            embeddings += torch.empty_like(embeddings).uniform_(-0.1, 0.1)
            noised = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
            p, q = logits.softmax(-1), noised.softmax(-1)
            both = ((p - q) * (p.log() - q.log())).sum() / len(p)
            log(curves, i + 1, losses__r3f=both)
            loss = loss + 0.7 * both
        loss.backward()
        before = [p.detach().clone() for p in model.parameters()]
        norm, free = step(rate), 1 / (1 + np.exp(-1.5 * (i + 1 - 3)))
        for (name, p), old, origin in zip(model.named_parameters(), before, start.parameters(), strict=True):
            new = name.startswith("classifier")
            if method == "recadam" and not new:
                p.data = old + free * (p.data - old) - rate * (1 - free) * 100 * (old - origin.data)
            for row, at in zip(p.data, origin.data, strict=True) if method == "mars" and p.ndim == 2 else ():
                radius, away = 0.01 if new else 0.02, (row - at).abs().sum()
                if away > radius:
                    row.copy_(at + (row - at) * radius / away)
        log(curves, i + 1, losses__total=loss, charts__grad_norm=norm, charts__learning_rate=rate,
            charts__distance_from_init=moved(model.base_model, start.base_model))  # fmt: skip
    return curves


def scores(logits, truth, classes):
    """Accuracy and macro-F1, class by class; a class that neither occurs nor is predicted counts 0."""
    predicted, f1 = logits.argmax(-1).tolist(), []
    for c in range(classes):
        hits = sum(p == c == q for p, q in zip(predicted, truth, strict=True))
        f1.append(2 * hits / max(predicted.count(c) + truth.count(c), 1))
    return sum(p == q for p, q in zip(predicted, truth, strict=True)) / len(truth), sum(f1) / classes


def judged(run_dir, logged, logits, truth, classes, steps):
    accuracy, macro = scores(logits, truth, classes)
    final = json.loads((run_dir / "metrics.json").read_text())["final"]
    assert (final["test/accuracy"], final["test/macro_f1"]) == pytest.approx((accuracy, macro))
    for tag in ("test/accuracy", "test/macro_f1", "test/micro_f1"):  # looked at once, at the end
        assert logged[tag] == {steps: pytest.approx(final[tag])}


def test_fine_tuning_on_images(zygote, tmp_path):
    from transformers import ViTForImageClassification

    names, tests = [f"{c}/{i}.png" for c in "abc" for i in range(3)], [f"{c}/{i}.png" for c in "ab" for i in range(4)]
    pixels, folder = write_images(tmp_path / "images/train", names), image_model(tmp_path / "model")
    others = write_images(tmp_path / "images/test", tests, seed=1)  # of c none: a class of train all the same
    code, _, said = zygote("finetune", tmp_path / "run", TUNED | {
        "--dataset": tmp_path / "images", "--model": folder, "--steps": 6, "--dropout": 0.2})  # fmt: skip
    assert code == 0, said

    def load(folder, dropout=0.2):
        torch.manual_seed(SEED)  # of the new layer
        return ViTForImageClassification.from_pretrained(folder, hidden_dropout_prob=dropout, num_labels=3).float()

    def inputs(rows, rng):  # half of them mirrored
        mirror = rng.random(4) < 0.5
        both = zip(pixels[rows], mirror, strict=True)
        return {"pixel_values": torch.stack([image.flip(-1) if it_is else image for image, it_is in both])}

    order = np.concatenate([np.random.default_rng([SEED, LAST, 0, epoch]).permutation(9) for epoch in range(3)])
    order = order[:24].reshape(6, 4)
    start, model = load(folder), load(folder).train()
    curves = tune(start, model, order, inputs, torch.arange(9) // 3, (0.9, 0.999), 1e-8)
    logged = agree(tmp_path / "run", curves, [load(tmp_path / "run/model")], [model], start)
    with torch.no_grad():
        judged(tmp_path / "run", logged, model.eval()(others).logits, [0] * 4 + [1] * 4, 3, 6)


METHODS = {
    "finetune": {},
    "recadam": {"--recadam-k": 1.5, "--recadam-midpoint": 3, "--recadam-strength": 100},
    "mars": {"--mars-gamma": 0.02, "--mars-head-gamma": 0.01},
    "r3f": {"--r3f-lambda": 0.7, "--r3f-eps": 0.1, "--r3f-noise": "uniform"},
}


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_on_texts(zygote, tmp_path, method):
    from transformers import AutoModelForSequenceClassification

    folder, parts = language_model(tmp_path / "model"), {}
    for split, n, classes in (("train", 11, "abc"), ("test", 6, "ab")):
        texts = write_texts(tmp_path / "lines.txt", n, seed=n)
        labels = [classes[i % len(classes)] for i in range(n)]
        parts[split] = texts, ["abc".index(label) for label in labels]
        (tmp_path / "texts").mkdir(exist_ok=True)
        lines = zip((tmp_path / "lines.txt").read_text().splitlines(), labels, strict=True)
        (tmp_path / f"texts/{split}.csv").write_text("text,label\n" + "".join(f"{line},{label}\n" for line, label in lines))
    code, _, said = zygote("finetune", tmp_path / "run", TUNED | METHODS[method] | {
        "--dataset": tmp_path / "texts", "--model": folder, "--epochs": 2, "--method": method})  # fmt: skip
    assert code == 0, said

    def load(folder):
        torch.manual_seed(SEED)  # of the new layer
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)

    def inputs(rows, _):
        ids, attention = padded([texts[row] for row in rows])
        return {"input_ids": ids, "attention_mask": attention}

    texts, labels = parts["train"]
    start, model = load(folder), load(folder).train()  # with its dropout
    curves = tune(start, model, batches(texts, LAST, 2, 4), inputs, torch.tensor(labels), (0.9, 0.98), 1e-6, method)
    logged = agree(tmp_path / "run", curves, [load(tmp_path / "run/model")], [model], start)
    texts, labels = parts["test"]
    with torch.no_grad():
        logits = torch.cat([model.eval()(torch.tensor([text])).logits for text in texts])
    judged(tmp_path / "run", logged, logits, labels, 3, 6)


# ------------------------------------------------------------------------------------------------ what is left open
# O: the authors' code; S: the paper; G: Gururangan et al. 2020, whose set-up the paper follows for texts; see README.md.
COMMON = {"weight_decay": 0.01, "seed": 1, "precision": "auto", "max_train_samples": None}
DISTILL = {"rounds": 1, "reconstruction_coef": 1.0, "distill_coef": 1.0, "student_init": "pretrained",
           "representation": "cls"}  # O  # fmt: skip
MAE = {"model": "facebook/vit-mae-base", "steps": 20_000, "batch_size": 64, "learning_rate": 1.5e-4, "warmup_ratio": 0.0,
       "mask_ratio": 0.75}  # O  # fmt: skip
MLM = {"model": "FacebookAI/roberta-base", "epochs": 100, "batch_size": 128, "learning_rate": 1e-4, "warmup_ratio": 0.06,
       "mlm_probability": 0.15, "max_length": 512}  # S, G  # fmt: skip
TUNE = {"batch_size": 32, "max_grad_norm": 1.0, "method": "finetune", "validate": False}
PUBLISHED = {"recadam_strength": 5000, "recadam_midpoint": 250, "recadam_k": 0.5, "mars_gamma": 7.4, "mars_head_gamma": 7.4,
             "r3f_lambda": 1.0, "r3f_eps": 1e-5, "r3f_noise": "uniform"}  # docs/baselines.md  # fmt: skip
RECIPE = {
    ("further_pretrain_vit", "cub"): MAE,
    ("self_distill_vit", "cub"): MAE | DISTILL,
    ("further_pretrain_roberta", "acl_arc"): MLM,
    ("self_distill_roberta", "acl_arc"): MLM | DISTILL,
    ("finetune", "cub"): TUNE | PUBLISHED | {"model": MAE["model"], "steps": 10_000, "learning_rate": 1e-4, "dropout": 0.1,
                                             "warmup_ratio": 500 / 10_000, "flip": True},  # S, O
    ("finetune", "acl_arc"): TUNE | {"model": MLM["model"], "epochs": 10, "learning_rate": 2e-5, "warmup_ratio": 0.06},  # S, G
}  # fmt: skip


@pytest.mark.parametrize(("name", "dataset"), RECIPE)
def test_the_papers_recipe_is_the_default(script, tmp_path, name, dataset, monkeypatch):
    module = script(name)
    if (name, dataset) == ("finetune", "acl_arc"):  # its main part does so for a model that reads texts
        monkeypatch.setitem(module.RECIPES, "paper", module.RECIPES["text"])
    args = vars(module.resolve(module.Args(dataset=dataset, run_dir=str(tmp_path / "run"))))
    expected = COMMON | RECIPE[name, dataset]
    assert {key: args[key] for key in expected} == expected
    args = module.resolve(module.Args(run_dir=str(tmp_path / "small")))  # on the embedded sets: short runs
    if name == "finetune":  # and few labels
        assert (args.flip, args.max_train_samples, args.recadam_strength, args.recadam_midpoint) == (False, 200, 500, 8)
    length = args.epochs if "roberta" in name else args.steps
    assert (args.learning_rate, length) == (5e-4, 3 if "roberta" in name else 200 if name == "finetune" else 100)


def test_the_table_of_data_sets_is_the_scripts(script):
    """docs/datasets.md, written from the sources, against the tables that the scripts load and compare with."""
    module, shown = script("finetune"), {}
    for line in (ROOT / "docs/datasets.md").read_text().splitlines():
        if line.startswith("| `"):
            name, source, _, train, test, classes, metric = (cell.strip() for cell in line.strip("|").split("|"))
            whole = "train+validation" if "(train + validation)" in train else "train"
            counts = [int(cell.split()[0].replace(",", "")) for cell in (train, test, classes)]
            shown[name.strip("`")] = whole, *counts, metric.lower().replace("-", "_"), source
    tables = module.IMAGE_SETS | module.TEXT_SETS
    assert shown.keys() == tables.keys()
    for name, (hub, _, _, _, classes, split, train, test) in tables.items():
        metric = module.METRICS.get(name, "accuracy" if name in module.IMAGE_SETS else "macro_f1")
        assert (split, train, test, classes, metric) == shown[name][:5] and (hub is None or f"`{hub}`" in shown[name][5]), name
    for name, (hub, options, *_) in tables.items():
        named = re.findall(r"`([^`]+)`", shown[name][5])
        assert hub is None or named == [hub, *(str(value)[:7] for value in options.values())], name
