"""The text half: masking, batches and the method against slow versions written here, four kinds of models, scripts, faults."""

import json
import re
import runpy
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, texts_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy

FP32 = torch.autocast("cpu", enabled=False)
WORDS = [f"w{i}" for i in range(90)]
SHAPE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = ("roberta", "bert", "distilbert", "modernbert")


def config(kind):
    """transformers is imported in functions alone: it fixes the Hub cache when imported, and conftest sets that first."""
    from transformers import BertConfig, DistilBertConfig, ModernBertConfig, RobertaConfig

    ends = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    if kind == "roberta":
        return RobertaConfig(**SHAPE, **ends, max_position_embeddings=42)
    if kind == "bert":
        return BertConfig(**SHAPE, pad_token_id=1, max_position_embeddings=40)
    if kind == "distilbert":
        return DistilBertConfig(vocab_size=96, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=40,
                                pad_token_id=1)  # fmt: skip
    return ModernBertConfig(**SHAPE, **ends, cls_token_id=0, sep_token_id=2, max_position_embeddings=40,
                            attn_implementation="sdpa")  # fmt: skip


@pytest.fixture(scope="module")
def sd(script):
    return script("self_distill_roberta")


def word_tokenizer(size=96, template="<s> $A </s>", **special):
    """Words w0 to w89, ids 6 up; <s> first and </s> last."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "<x>": 5}
    vocabulary |= {word: 6 + i for i, word in enumerate(WORDS[: size - 6])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>",
             "unk_token": "<unk>", "mask_token": "<mask>"} | special  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v})


@pytest.fixture(scope="module")
def folders(hub, tmp_path_factory):
    """{kind: folder} of random models, each with its tokenizer."""
    from transformers import AutoModelForMaskedLM

    out = {}
    for kind in KINDS:
        torch.manual_seed(0)
        out[kind] = tmp_path_factory.mktemp(kind) / "model"
        AutoModelForMaskedLM.from_config(config(kind)).save_pretrained(out[kind])
        word_tokenizer().save_pretrained(out[kind])
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A file of 50 labelled texts of 3 to 60 words."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(3, 60))), "label": "ab"[i % 2]} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ready(sd, folder, n=6):
    """A loaded model without dropout (it would differ between the two passes compared), and a batch."""
    model, tokenizer = sd.load_model(str(folder))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.eval()  # the attention's own dropout too
    rng = np.random.default_rng(0)
    texts = [np.array([0, *rng.integers(6, 96, k), 2]) for k in rng.integers(3, 30, n)]
    plain = np.arange(96) >= 6
    return model, tokenizer, texts, sd.collate(texts, range(n), tokenizer, "cpu", plain, 0.3, np.random.default_rng(1))


# ------------------------------------------------------------------------------------------------ masking, batches
def test_masking_proportions_and_exclusions(sd):
    ids = np.random.default_rng(0).integers(0, 1000, (400, 500))
    plain = np.arange(1000) >= 100
    masked, chosen = sd.mask_tokens(ids, plain, 4, 0.15, np.random.default_rng(1))
    before, after, chosen = ids.flatten(), masked.flatten(), chosen.flatten()
    where = np.flatnonzero(chosen)
    assert not chosen[~plain[before]].any() and (before == after)[~chosen].all()
    assert chosen[plain[before]].mean() == pytest.approx(0.15, abs=0.004)
    assert (after[where] == 4).mean() == pytest.approx(0.8, abs=0.01)
    assert (after[where] == before[where]).mean() == pytest.approx(0.1, abs=0.01)
    other = after[where][(after[where] != 4) & (after[where] != before[where])]
    assert len(other) / len(where) == pytest.approx(0.1, abs=0.01) and plain[other].all() and len(set(other)) > 800
    again, _ = sd.mask_tokens(ids, plain, 4, 0.15, np.random.default_rng(1))
    afresh, _ = sd.mask_tokens(ids, plain, 4, 0.15, np.random.default_rng(2))
    assert (again == masked).all() and (afresh != masked).any()


def test_padding_and_special_tokens_are_never_chosen(sd, folders):
    _, _, texts, batch = ready(sd, folders["roberta"])
    ids, where = batch["ids"].flatten(), batch["where"]
    assert len(where) > 5 and (ids[where] >= 6).all()
    assert batch["attention"].sum() == sum(len(text) for text in texts) and (batch["ids"][batch["attention"] == 0] == 1).all()
    assert (batch["start"] == 0).all() and (batch["masked"] != batch["ids"]).any()


@pytest.mark.parametrize(("n", "size"), [(1000, 16), (1003, 16), (5, 16), (2000, 8), (1, 1)])
def test_batches_visit_every_row_once_an_epoch_and_pad_little(sd, n, size):
    lengths = np.random.default_rng(0).integers(3, 128, n)
    batches, other = (sd.batches_of_epochs(sd.Args(batch_size=size, epochs=1), t, lengths) for t in (0, 1))
    assert sorted(np.concatenate(batches)) == list(range(n)) and len(batches) == -(-n // size)
    assert sorted(len(rows) for rows in batches)[1:] == [size] * (len(batches) - 1)
    if n >= 1000:
        assert sum(lengths[rows].max() * len(rows) for rows in batches) < 1.2 * lengths.sum()  # shuffled: 1.9 times
        assert any(set(a) != set(b) for a, b in zip(batches, other, strict=True))
        tops = [lengths[rows].max() for rows in batches]
        assert abs(np.corrcoef(tops, np.arange(len(tops)))[0, 1]) < 0.5  # not from short to long


def test_batches_of_a_small_set_are_others_in_each_epoch_and_favour_no_length(sd):
    """As many texts as SciERC has, at the paper's batch: sorted by length alone three of four pairs met again."""
    n, size, epochs = 3219, 128, 40
    lengths = np.random.default_rng(0).lognormal(4, 0.5, n).astype(int).clip(3, 512)
    batches = sd.batches_of_epochs(sd.Args(batch_size=size, epochs=epochs), 0, lengths)
    epochs = [batches[i : i + 26] for i in range(0, len(batches), 26)]
    place = np.array([np.concatenate([np.full(len(rows), b) for b, rows in enumerate(epoch)])[
        np.concatenate(epoch).argsort()] for epoch in epochs])  # (epochs, n): the batch of each text  # fmt: skip
    pairs = np.random.default_rng(1).integers(0, n, (200_000, 2))
    first, second = (place[e][pairs[:, 0]] == place[e][pairs[:, 1]] for e in (0, 1))
    assert (first & second).sum() < 0.3 * first.sum()
    short = [rows for rows in batches if len(rows) < size]  # 3,219 are 25 whole batches and 19 texts
    assert len(short) == 40 and {len(rows) for rows in short} == {19}
    assert np.unique(np.concatenate(short)).size > 600  # 760 draws from 3,219 are 677 different ones
    assert abs(np.concatenate([lengths[rows] for rows in short]).mean() / lengths.mean() - 1) < 0.1


# ------------------------------------------------------------------------------------------------ the method
@pytest.mark.parametrize("kind", KINDS)
def test_loss_at_masked_positions_is_the_librarys(sd, folders, kind):
    model, _, _, batch = ready(sd, folders[kind])
    labels = torch.full_like(batch["ids"], -100).flatten()
    labels[batch["where"]] = batch["ids"].flatten()[batch["where"]]
    full = model(input_ids=batch["masked"], attention_mask=batch["attention"], labels=labels.view_as(batch["ids"]))
    logits = sd.masked_logits(model, batch)
    assert logits.shape == (len(batch["where"]), 96)
    torch.testing.assert_close(logits, full.logits.flatten(0, 1)[batch["where"]], rtol=1e-4, atol=1e-5)
    optimizer, scheduler = sd.optimizer_and_schedule(model, sd.Args(learning_rate=0.0, warmup_ratio=0.0), 1, (0.9, 0.98), 1e-6)
    losses = sd.update(model, optimizer, scheduler, batch, FP32, None, sd.Args())
    torch.testing.assert_close(losses["losses/mlm"], full.loss.detach(), rtol=1e-5, atol=1e-6)
    hidden = model.base_model(batch["ids"], attention_mask=batch["attention"]).last_hidden_state
    assert hidden.shape == (*batch["ids"].shape, 32)  # the hook is gone
    torch.testing.assert_close(sd.encode(model, batch), hidden[:, 0])


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_gradients_are_those_of_a_slow_version_with_a_live_teacher(sd, folders, kind):
    student, tokenizer, texts, batch = ready(sd, folders[kind])
    slow, teacher = (ready(sd, folders[kind])[0] for _ in range(2))
    torch.manual_seed(1)
    for p in teacher.parameters():
        p.data += 0.02 * torch.randn_like(p)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    constants = sd.encode_all(teacher, texts, tokenizer, FP32)
    args = sd.Args(learning_rate=1e-3, warmup_ratio=0.0, reconstruction_coef=0.5, distill_coef=2.0)
    optimizer, scheduler = sd.optimizer_and_schedule(student, args, 10, (0.9, 0.98), 1e-6)
    optimizer.zero_grad = lambda: None  # keep the gradients to look at
    losses = sd.update(student, optimizer, scheduler, batch, FP32, constants, args)

    logits = slow(input_ids=batch["masked"], attention_mask=batch["attention"]).logits
    ids, length = batch["ids"], batch["ids"].shape[1]
    each = [cross_entropy(logits[k // length, k % length], ids[k // length, k % length]) for k in batch["where"].tolist()]
    (0.5 * torch.stack(each).mean()).backward()
    distance = 0.0
    teacher.eval()
    for text in texts:  # one at a time, so with no padding at all
        one = torch.from_numpy(text)[None]
        with torch.no_grad():
            target = teacher.base_model(one).last_hidden_state[0, 0]
        distance = distance + ((slow.base_model(one).last_hidden_state[0, 0] - target) ** 2).sum() / len(texts)
    (2.0 * distance).backward()

    torch.testing.assert_close(losses["losses/distill"], distance.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["losses/total"], 0.5 * losses["losses/mlm"] + 2.0 * losses["losses/distill"])
    assert losses["losses/distill"] > 1e-3
    for (name, p), q in zip(student.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize("names", [{"cls_token": "</s>"}, {"cls_token": None}, {"bos_token": None}])
def test_the_start_is_found_whatever_its_name(sd, names):
    """XLM's and FlauBERT's tokenizers name the last token cls."""
    tokenizer = word_tokenizer(**names)
    texts = [np.array(tokenizer(text)["input_ids"]) for text in ("w1 w2 w3", "w4")]
    padded = sd.collate(texts, [0, 1], tokenizer, "cpu")
    assert padded["start"].tolist() == [0, 0]
    if names.get("cls_token", "<s>") == "<s>":  # a start that is not the first
        late = [np.array([5, 0, 7]), np.array([0, 8])]
        assert sd.collate(late, [0, 1], tokenizer, "cpu")["start"].tolist() == [1, 0]


def test_texts_keep_their_order_whatever_their_length(sd, folders):
    model, tokenizer, texts, _ = ready(sd, folders["bert"], n=20)
    vectors = sd.encode_all(model, texts, tokenizer, FP32)
    alone = torch.cat([sd.encode_all(model, [text], tokenizer, FP32) for text in texts])
    torch.testing.assert_close(vectors, alone, rtol=1e-4, atol=1e-5)


def test_a_batch_with_nothing_masked_has_loss_zero(sd, folders):
    model, tokenizer, texts, _ = ready(sd, folders["roberta"])
    batch = sd.collate(texts, [0], tokenizer, "cpu", np.arange(96) >= 6, 0.0, np.random.default_rng(0))
    args = sd.Args(learning_rate=0.0, warmup_ratio=0.0)
    losses = sd.update(model, *sd.optimizer_and_schedule(model, args, 1, (0.9, 0.98)), batch, FP32, None, args)
    assert losses["losses/mlm"] == 0 == losses["charts/grad_norm"]
    for seed in range(20):  # of one word each of two processes takes half: the mean of their losses is that of one process
        one, two = (sd.collate(texts, [0], tokenizer, "cpu", np.arange(96) >= 6, 0.1, np.random.default_rng(seed), world=world)
                    for world in (1, 2))  # fmt: skip
        assert one["tokens"] == 2 * two["tokens"] == max(len(one["where"]), 1)


def test_looking_is_without_dropout_and_leaves_it_on_for_the_training(sd, script, folders):
    model, tokenizer = sd.load_model(str(folders["roberta"]))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    plain = np.arange(96) >= 6
    texts = [np.array([0, *rng.integers(6, 96, 30), 2]) for rng in map(np.random.default_rng, range(12))]
    tuned = script("finetune").load_model(str(folders["roberta"]), model.config, list("abcdefgh"), 0.5)[0].train()
    labels = np.arange(12) % 8

    def inputs(rows):
        return {"input_ids": torch.from_numpy(np.stack([texts[row] for row in rows]))}

    for look in (lambda: sd.encode_all(model.train(), texts, tokenizer, FP32).tolist(),
                 lambda: sd.look(model.train(), texts, tokenizer, plain, 0.15, FP32),
                 lambda: script("finetune").scores(tuned.train(), inputs, labels, FP32)):  # fmt: skip
        assert look() == look()
        assert model.training and tuned.training


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_what_is_looked_at_is_what_the_model_makes_of_masked_texts(sd, folders, kind):
    model, tokenizer, texts, _ = ready(sd, folders[kind], n=8)
    plain = np.arange(96) >= 6
    accuracy, table = sd.look(model, texts, tokenizer, plain, 0.3, FP32)
    batch = sd.collate(texts, range(8), tokenizer, "cpu", plain, 0.3, np.random.default_rng(0))
    logits = model.eval()(input_ids=batch["masked"], attention_mask=batch["attention"]).logits.flatten(0, 1)[batch["where"]]
    truth, top = batch["ids"].flatten()[batch["where"]], logits.topk(3).indices  # (M,), (M, 3)
    assert accuracy == pytest.approx((top[:, 0] == truth).float().mean().item())
    found = re.findall(r"(?:\||; )(\S+): (\S+), (\S+), ([^|;]+)", table.replace("&lt;", "<"))
    assert len(found) > 10
    assert [tokenizer.convert_tokens_to_ids(list(row)) for row in found] == torch.cat([truth[:, None], top], 1).tolist()


def test_roberta_tables_hold_two_places_fewer_than_rows(sd, folders, tmp_path):
    assert [sd.load_model(str(folders[kind]))[1].model_max_length for kind in ("roberta", "bert", "modernbert")] == [40] * 3
    from transformers import RobertaForMaskedLM

    shape = config("roberta")
    shape.max_position_embeddings = 40  # two of which are not for tokens: 38, down to a multiple of 8
    RobertaForMaskedLM(shape).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    assert sd.load_model(str(tmp_path / "model"))[1].model_max_length == 32


# ------------------------------------------------------------------------------------------------ the scripts
def tags(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return events, {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_an_environment_in_a_folder_called_tests_has_docstrings_too(script, tmp_path, monkeypatch):
    module, text = script("self_distill_roberta"), "Nothing but a paragraph of ten words that ends in a dot."
    (tmp_path / "tests/lib/tests").mkdir(parents=True)
    (tmp_path / "tests/lib/__init__.py").write_text(f'"""{text}"""')
    (tmp_path / "tests/lib/tests/more.py").write_text(f'"""{text.replace("ten", "other")}"""')  # the library's own tests
    monkeypatch.setattr(module, "LIBRARIES", ("lib",))
    monkeypatch.syspath_prepend(tmp_path / "tests")
    assert list(module.docstrings("")) == [{"text": text, "label": "lib"}]


DISTILLED = ("--epochs", 3, "--max-train-samples", 320, "--log-every", 5, "--eval-every", 30)


@pytest.fixture(scope="module")
def distilled(run, tmp_path_factory):
    """One run of all of Algorithm 1 on 320 docstrings."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    return run_dir, run("self_distill_roberta", "--run-dir", run_dir, *DISTILLED, own=True)


def test_a_run_on_docstrings_learns_and_leaves_the_right_files(distilled):
    from transformers import AutoModelForSequenceClassification

    run_dir, done = distilled
    names = {p.name for p in run_dir.iterdir() if not p.name.startswith("events")}
    assert names == {"model", "round_0", "round_1", "metrics.json"}
    events, scalars = tags(run_dir)
    assert set(scalars) == {"losses/mlm", "losses/distill", "losses/total", "charts/learning_rate", "charts/grad_norm",
                            "charts/samples_per_second", "charts/distance_from_init", "charts/distill_unexplained",
                            "eval/knn_accuracy", "eval/knn_accuracy_start", "eval/knn_accuracy_teacher",
                            "eval/masked_accuracy"}  # fmt: skip
    mlm = dict(scalars["losses/mlm"])
    assert np.mean([mlm[20], mlm[25], mlm[30]]) < np.mean([mlm[5], mlm[10]])
    assert [step for step, _ in scalars["losses/distill"]] == [35, 40, 45, 50, 55, 60]  # none in round 0
    distances = [value for _, value in scalars["losses/distill"]]
    assert min(distances) > 0 and distances[-1] < 0.7 * distances[0]
    assert scalars["eval/knn_accuracy_teacher"] == [(31, dict(scalars["eval/knn_accuracy"])[30])]  # what round 0 ended with
    assert "(a small run: real texts, a tiny model)" in done.stdout and "mlm=" in done.stderr
    assert [step for step, _ in scalars["charts/distill_unexplained"]] == [60]  # measured with the model, in eval mode
    assert 0 < scalars["charts/distill_unexplained"][0][1] < 1  # the step's distance, with dropout, is farther than the spread
    shown = events.Tensors("eval/guesses/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    assert shown[0] == "|masked text|truth: the model's top 3|" and len(shown) == 10
    assert all(line.count("|") == 3 for line in shown[2:]) and any("&lt;mask>" in line for line in shown)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["stage"] == "self_distill_roberta" and metrics["final"]["losses/distill"] > 0
    assert metrics["samples_per_second"] == pytest.approx(6 * 320 / metrics["seconds"], rel=0.05)
    assert scalars["charts/samples_per_second"][-1][1] == pytest.approx(metrics["samples_per_second"], rel=0.4)
    assert metrics["final"]["charts/distill_unexplained"] == pytest.approx(scalars["charts/distill_unexplained"][0][1])
    said = f"/finetune.py --dataset docstrings --max-train-samples 320 --seed 1 --model {run_dir}/model --max-length 512\n"
    assert said in done.stdout
    model, info = AutoModelForSequenceClassification.from_pretrained(run_dir / "model", output_loading_info=True)
    assert all(key.startswith("classifier.") for key in info["missing_keys"]) and model.config.hidden_dropout_prob == 0.1


def test_stage_by_stage_is_the_one_command_and_finetune_takes_over(distilled, run, sd, tmp_path):
    """Stage 1, then stage 2 with its model as the teacher, is what one command does in two rounds, bit for bit."""
    import tyro

    flags = (*DISTILLED, "--eval-every", 0)
    done = run("further_pretrain_roberta", "--run-dir", tmp_path / "further", *flags, own=True)
    _, then, *words = shlex.split(done.stdout.strip().splitlines()[-1])
    args = tyro.cli(sd.Args, args=words)  # what it says comes next
    assert then.endswith("self_distill_roberta.py") and args.teacher == str(tmp_path / "further/model")
    assert (args.model, args.epochs, args.max_train_samples) == (str(ROOT / "pretrained/roberta-tiny"), 3, 320)
    assert {"--mlm-probability", "--max-length", "--learning-rate", "--seed"} < set(words)
    run("self_distill_roberta", "--teacher", tmp_path / "further/model", "--run-dir", tmp_path / "run", *flags)
    files = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("events")}
    assert files == {"model", "round_1", "metrics.json"}
    for one, two in ((tmp_path / "further/model", "round_0"), (tmp_path / "run/model", "round_1")):
        one, two = (load_file(path / "model.safetensors") for path in (one, distilled[0] / two))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    done = run("finetune", "--dataset", "docstrings", "--model", tmp_path / "further/model", "--run-dir", tmp_path / "tuned",
               "--epochs", 1, "--max-train-samples", 64)  # fmt: skip
    assert "new: classifier.dense.bias" in done.stdout and (tmp_path / "tuned/metrics.json").exists()


def test_a_column_may_be_named_input(script, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "d.csv").write_text("input,label\nsome words,a\nother words,b\n")
    fp, tokenizer = script("further_pretrain_roberta"), AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")
    data, names = texts_of(fp, fp.Args(dataset=str(tmp_path / "d.csv")), tokenizer, ("train",))
    found = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in data["train"][0]]
    assert found == ["some words", "other words"] and names == ["a", "b"]


def test_docstrings_are_balanced_scrubbed_and_disjoint(distilled, script):
    from transformers import AutoTokenizer

    sd = script("self_distill_roberta")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")
    data, names = texts_of(sd, sd.Args(), tokenizer)
    texts = {split: [tokenizer.decode(ids, skip_special_tokens=True) for ids in data[split][0]] for split in data}
    assert names == sorted(sd.LIBRARIES) and [len(texts[split]) for split in ("train", "test")] == [2000, 480]
    assert set(np.bincount(data["train"][1])) == {250} and set(np.bincount(data["test"][1])) == {60}
    whole = texts["train"] + texts["test"]
    assert len(set(whole)) > 2470  # a few differ only after the cut at 128 tokens
    assert not [text for text in whole if re.search(rf"\b({'|'.join(sd.LIBRARIES)})\b", text.lower())]
    assert not [text for text in texts["train"] if re.search(r"[a-z]\.[a-z]", text)]  # nor a path of one


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_other_models_and_a_corpus_shorter_than_a_batch(run, folders, corpus, tmp_path, kind):
    done = run("further_pretrain_roberta", "--model", folders[kind], "--dataset", corpus, "--run-dir", tmp_path / "run",
               "--epochs", 2, "--learning-rate", 1e-3)  # fmt: skip
    assert (tmp_path / "run/model/model.safetensors").exists() and "45 texts" in done.stdout  # of 50, a tenth held out


def test_published_roberta_layout_loads_from_a_hub_cache(sd, folders, hub):
    """roberta-base's file has a pooler and no copy of what is tied; and the name alone finds it, offline."""
    snapshot = hub / "hub/models--FacebookAI--roberta-base/snapshots" / ("0" * 40)
    shutil.copytree(folders["roberta"], snapshot)
    weights = {k: v for k, v in load_file(snapshot / "model.safetensors").items() if not k.startswith("lm_head.decoder")}
    weights |= {"roberta.pooler.dense.weight": torch.zeros(32, 32), "roberta.pooler.dense.bias": torch.zeros(32)}
    save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    model, tokenizer = sd.load_model(sd.RECIPES["paper"]["model"])
    assert len(tokenizer) == 96 and model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    assert model.lm_head.decoder.bias is model.lm_head.bias
    shutil.rmtree(snapshot.parent.parent)  # other tests look at what happens without it, in whatever order they run


def test_acl_arc_by_name_runs_the_papers_recipe_from_a_prepared_hub_cache(hub, run, folders, tmp_path):
    """Rows, columns and label type of the real repository; random texts and weights."""
    from datasets import Value
    from test_datasets import standin

    columns = {"text": Value("string"), "label": Value("string")}
    standin(hub, "zapsdcn/citation_intent", columns, {"train": 1688, "validation": 114, "test": 139}, classes=6)
    flags = ("--dataset", "acl_arc", "--model", folders["roberta"], "--epochs", 1)
    run("self_distill_roberta", *flags, "--run-dir", tmp_path / "run")
    args = json.loads((tmp_path / "run/metrics.json").read_text())["args"]
    assert (args["batch_size"], args["learning_rate"], args["warmup_ratio"]) == (128, 1e-4, 0.06)
    assert (args["mlm_probability"], args["weight_decay"], args["max_length"]) == (0.15, 0.01, 512)
    run("finetune", *flags, "--model", tmp_path / "run/model", "--run-dir", tmp_path / "tuned")
    metrics = json.loads((tmp_path / "tuned/metrics.json").read_text())
    assert metrics["final"]["metric"] == "macro_f1" and metrics["args"]["learning_rate"] == 2e-5
    assert len(json.loads((tmp_path / "tuned/model/config.json").read_text())["id2label"]) == 6


@pytest.mark.slow
def test_the_chain_on_the_real_acl_arc_is_far_above_the_largest_class(run, tmp_path):
    data = ROOT.parent / "shared/data/text/acl_arc"
    if not data.exists():
        pytest.skip("the shared data is not here")
    tiny, flags = ROOT / "pretrained/roberta-tiny", ("--dataset", data, "--learning-rate", 5e-4)
    run("self_distill_roberta", *flags, "--model", tiny, "--epochs", 3, "--batch-size", 32, "--run-dir", tmp_path / "run")
    run("finetune", *flags, "--model", tmp_path / "run/model", "--run-dir", tmp_path / "tuned")
    from datasets import load_dataset
    from sklearn.metrics import f1_score

    truth = load_dataset(str(data), split="test")["label"][:]
    largest = max(set(truth), key=truth.count)
    chance = f1_score(truth, [largest] * len(truth), average="macro", zero_division=0)
    final = json.loads((tmp_path / "tuned/metrics.json").read_text())["final"]
    assert chance < 0.15 and final["test/macro_f1"] > chance + 0.15


# ------------------------------------------------------------------------------------------------ faults
def texts_file(folder, rows):
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def broken_model(folders, tmp_path, fault):
    import transformers as hf

    path = shutil.copytree(folders["roberta"], tmp_path / fault)
    if fault == "no head":
        hf.RobertaModel(config("roberta"), add_pooling_layer=False).save_pretrained(path)
    elif fault == "gpt2":
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2)).save_pretrained(path)
    elif fault == "dropped layers":  # model.layers.1, where RoBERTa has encoder.layer.1
        shape = config("modernbert")
        hf.ModernBertForMaskedLM(shape).save_pretrained(path)
        shape.num_hidden_layers = 1
        shape.layer_types = shape.layer_types[:1]
        shape.save_pretrained(path)
    elif fault == "no mask":
        word_tokenizer(mask_token=None).save_pretrained(path)
    elif fault == "no padding":
        word_tokenizer(pad_token=None).save_pretrained(path)
    elif fault == "no start":
        word_tokenizer(template="$A </s>").save_pretrained(path)
    elif fault == "no attention":
        hf.FNetForMaskedLM(hf.FNetConfig(**SHAPE, max_position_embeddings=40)).save_pretrained(path)
        word_tokenizer(model_input_names=["input_ids", "token_type_ids"]).save_pretrained(path)
    elif fault == "few places":  # as RoBERTa it counts from 2, but nothing in its name says so
        hf.CamembertForMaskedLM(hf.CamembertConfig(**SHAPE, pad_token_id=1, max_position_embeddings=40)).save_pretrained(path)
    else:
        word_tokenizer(size=60).save_pretrained(path)
    return path


def test_two_runs_begun_at_once_do_not_share_a_folder(folders, corpus, tmp_path, monkeypatch, capfd):
    """The other one made it while this one read its data."""
    import datasets

    read = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (tmp_path / "run").mkdir() or read(*a, **k))
    flags = ["--model", folders["roberta"], "--dataset", corpus, "--run-dir", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", ["further_pretrain_roberta.py", *map(str, flags)])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "further_pretrain_roberta.py"), run_name="__main__")
    assert exit.value.code == 2 and f"error: cannot write to {tmp_path}/run: " in capfd.readouterr().err
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("fault", ["shape", "words"])
def test_a_teacher_of_another_kind_is_refused(zygote, folders, corpus, tmp_path, fault):
    from transformers import RobertaForMaskedLM

    teacher = shutil.copytree(folders["roberta"], tmp_path / "teacher")
    if fault == "shape":
        shape = config("roberta")
        shape.intermediate_size *= 2
        RobertaForMaskedLM(shape).save_pretrained(teacher)
    else:  # the same words by other numbers: its vectors would be those of other texts
        words = json.loads((teacher / "tokenizer.json").read_text())
        vocabulary = words["model"]["vocab"]
        vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
        (teacher / "tokenizer.json").write_text(json.dumps(words))
    flags = {"--model": folders["roberta"], "--teacher": teacher, "--dataset": corpus}
    code, _, said = zygote("self_distill_roberta", tmp_path / "run", flags)
    line = f"error: --teacher {teacher} has another shape or tokenizer than --model {folders['roberta']}: "
    assert code == 2 and said.splitlines()[-1].startswith(line) and not (tmp_path / "run").exists(), said[-1000:]


@pytest.mark.parametrize(("fault", "line"), [
    ("few places", "{} does not run on this data: "),
    ("no padding", "{}: a tokenizer of 96 tokens (padding: None) does not go with a vocabulary of 96, or cannot pad"),
])  # fmt: skip
def test_finetune_refuses_what_could_not_read_the_texts(zygote, folders, corpus, tmp_path, fault, line):
    model = broken_model(folders, tmp_path, fault)
    code, _, said = zygote("finetune", tmp_path / "run", {"--model": model, "--dataset": corpus})
    assert code == 2 and said.splitlines()[-1].startswith("error: " + line.format(model)), said[-1000:]
    assert not (tmp_path / "run").exists()


# What is given, and the line that is said; one that ends in "..." goes on with a library's own words.
FAULTS = {
    "no such data": (lambda t, f: ("--dataset", "nosuch"), "unknown dataset nosuch: give docstrings, chemprot, acl_arc, "
                     "scierc, twitter_emotion, a folder, a file, or a Hub id (owner/name)"),
    "empty file": (lambda t, f: ("--dataset", texts_file(t, [])), "cannot load {dataset}: ..."),
    "empty column": (lambda t, f: ("--dataset", texts_file(t, [{"text": ""}, {"text": None}, {"text": " "}])),
                     "{dataset}: column text of train is empty or of special tokens only: there is nothing to learn from"),
    "special only": (lambda t, f: ("--dataset", texts_file(t, [{"text": "<mask> </s>"}, {"text": "<s>"}])),
                     "{dataset}: column text of train is empty or of special tokens only: there is nothing to learn from"),
    "no text column": (lambda t, f: ("--dataset", texts_file(t, [{"body": "w1", "title": "w2", "n": 1}])), "{dataset}: the "
                       "input or label column (None, None) is missing or not what the model reads, columns are body, title, n:"
                       " see --input-column and --label-column"),
    "no head": (lambda t, f: ("--model", broken_model(f, t, "no head")),
                "{model} is not a masked language model with its head: no weights, or no place, for lm_head.bias, ..."),
    "dropped layers": (lambda t, f: ("--model", broken_model(f, t, "dropped layers")),
                       "{model} is not a masked language model with its head: no weights, or no place, for ..."),
    "gpt2": (lambda t, f: ("--model", broken_model(f, t, "gpt2")), "cannot load model {model}: ..."),
    "no mask": (lambda t, f: ("--model", broken_model(f, t, "no mask")),
                "the tokenizer of {model} has no mask or padding token, or puts no start token before a text, but <s>, </s>, "
                "<unk>, <pad>"),
    "no padding": (lambda t, f: ("--model", broken_model(f, t, "no padding")),
                   "the tokenizer of {model} has no mask or padding token, or puts no start token before a text, but <s>, "
                   "</s>, <unk>, <mask>"),
    "no start": (lambda t, f: ("--model", broken_model(f, t, "no start")),
                 "the tokenizer of {model} has no mask or padding token, or puts no start token before a text, but <s>, "
                 "</s>, <unk>, <pad>, <mask>"),
    "no attention": (lambda t, f: ("--model", broken_model(f, t, "no attention")),
                     "{model} (fnet) is not an encoder of token ids and an attention mask, and of nothing else"),
    "few places": (lambda t, f: ("--model", broken_model(f, t, "few places")), "{model} does not run on these texts: ..."),
    "vocabulary": (lambda t, f: ("--model", broken_model(f, t, "vocabulary")),
                   "{model}: a tokenizer of 60 tokens does not go with a vocabulary of 96"),
    "share": (lambda t, f: ("--mlm-probability", "0"),
              "--mlm-probability is 0.0, it must be at least 0.01 and at most 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_ends_in_one_line_and_leaves_nothing(fault, folders, corpus, tmp_path, monkeypatch, capfd):
    """The script's main part in this process: a fault ends it before it has changed anything here."""
    flags, message = FAULTS[fault][0](tmp_path, folders), FAULTS[fault][1]
    given = {"--model": folders["roberta"], "--dataset": corpus, "--run-dir": tmp_path / "run"} | dict([flags])
    monkeypatch.setattr("sys.argv", ["further_pretrain_roberta.py", *[str(x) for pair in given.items() for x in pair]])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "further_pretrain_roberta.py"), run_name="__main__")
    errors = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert exit.value.code == 2 and len(errors) == 1
    expected = "error: " + message.format(**{key.strip("-"): value for key, value in given.items()})
    assert errors[0] == expected or (message.endswith("...") and errors[0].startswith(expected[:-3]))
    assert not (tmp_path / "run").exists()
