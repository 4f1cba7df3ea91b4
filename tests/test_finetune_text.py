"""finetune.py on texts: the hand-off, the scores, the data set's own metric."""

import json

import pytest
from conftest import ROOT

TINY = ROOT / "pretrained/roberta-tiny"


def test_docstrings_are_learned_and_the_result_works_in_a_pipeline(run, tmp_path):
    done = run("finetune", "--dataset", "docstrings", "--run-dir", tmp_path / "run", "--epochs", 6, "--log-every", 5)
    assert "left out: lm_head" in done.stdout and "400 texts for training, 480 for test, 8 classes" in done.stdout
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["parent"] == str(TINY) and metrics["final"]["metric"] == "accuracy"
    assert metrics["final"]["test/metric"] == metrics["final"]["test/accuracy"] > 0.2  # chance is 0.125
    from transformers import pipeline

    answer = pipeline("text-classification", model=str(tmp_path / "run/model"))("Returns a tensor of the same shape.")
    assert answer[0]["label"] in json.loads((tmp_path / "run/model/config.json").read_text())["label2id"]


def test_own_csv_with_string_labels_and_macro_f1(run, tmp_path):
    rows = [("good fine great lovely", "pro"), ("bad awful poor terrible", "contra")] * 20
    lines = [f"{text} {i},{label}\n" for i, (text, label) in enumerate(rows)]
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(lines))
    flags = ("--dataset", tmp_path / "own.csv", "--model", TINY, "--epochs", 8, "--learning-rate", 1e-3, "--batch-size", 8)
    done = run("finetune", "--run-dir", tmp_path / "run", *flags, "--max-length", 16)
    assert "has no test split: 4 samples of train, stratified, are held out as one" in done.stdout
    final = json.loads((tmp_path / "run/metrics.json").read_text())["final"]
    assert final["metric"] == "macro_f1" and final["test/metric"] == final["test/macro_f1"] > 0.9
    assert json.loads((tmp_path / "run/model/config.json").read_text())["id2label"] == {"0": "contra", "1": "pro"}
    assert json.loads((tmp_path / "run/model/tokenizer_config.json").read_text())["model_max_length"] == 16  # as it was scored


@pytest.mark.parametrize("kind", ["vit-mae-tiny", "roberta-tiny"])
def test_a_classifier_of_other_classes_begins_anew_and_nothing_else_may(script, tmp_path, capsys, kind):
    import torch
    from transformers import AutoConfig

    ft, source = script("finetune"), str(ROOT / "pretrained" / kind)
    before, _, new = ft.load_model(source, AutoConfig.from_pretrained(source), list("abcd"), 0.0)
    before.save_pretrained(tmp_path / "four")
    config = AutoConfig.from_pretrained(tmp_path / "four")
    _, report, none = ft.load_model(str(tmp_path / "four"), config, list("abcd"), 0.0)
    assert none == [] and "new: nothing" in report
    as_many, _, others = ft.load_model(str(tmp_path / "four"), config, list("abdc"), 0.0)
    torch.manual_seed(1)
    other, report, fresh = ft.load_model(str(tmp_path / "four"), config, list("xyz"), 0.0)
    last = [key for key in new if other.state_dict()[key].shape != before.state_dict()[key].shape]
    assert sorted(others) == fresh == last and f"new: {', '.join(last)}" in report
    assert other.config.id2label == {0: "x", 1: "y", 2: "z"}
    head = other.state_dict()[next(key for key in last if key.endswith("weight"))]
    assert head.shape[0] == 3 and 0 < head.std() < 0.1 and torch.isfinite(head).all()
    weight = next(key for key in last if key.endswith("weight"))
    assert not torch.equal(as_many.state_dict()[weight], before.state_dict()[weight])
    assert 0.7 < as_many.state_dict()[weight].std() / head.std() < 1.4  # as the library makes one of another number
    assert not as_many.state_dict()[weight.replace("weight", "bias")].any()
    kept = [key for key in before.state_dict() if key not in last]
    assert all(torch.equal(before.state_dict()[key], as_many.state_dict()[key]) for key in kept)
    assert all(torch.equal(before.state_dict()[key], other.state_dict()[key]) for key in kept)
    wider = json.loads((tmp_path / "four/config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (tmp_path / "four/config.json").write_text(json.dumps(wider))
    assert ft.load_model(str(tmp_path / "four"), config, list("xyz"), 0.0)[0].config.problem_type is None
    wider["intermediate_size"] *= 2
    (tmp_path / "four/config.json").write_text(json.dumps(wider))
    with pytest.raises(SystemExit):
        ft.load_model(str(tmp_path / "four"), AutoConfig.from_pretrained(tmp_path / "four"), list("xyz"), 0.0)
    assert "do not fit a" in capsys.readouterr().err
