"""finetune.py on texts: the hand-off, the scores, the data set's own metric."""

import json

from conftest import ROOT

TINY = ROOT / "pretrained/roberta-tiny"


def test_docstrings_are_learned_and_the_result_works_in_a_pipeline(run, tmp_path):
    done = run("finetune", "--dataset", "docstrings", "--run-dir", tmp_path / "run", "--epochs", 4, "--log-every", 5)
    assert "left out: lm_head" in done.stdout and "400 texts for training, 480 for test, 8 classes" in done.stdout
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["parent"] == str(TINY) and metrics["final"]["metric"] == "accuracy"
    assert metrics["final"]["test/metric"] == metrics["final"]["test/accuracy"] > 0.18  # chance is 0.125
    from transformers import pipeline

    answer = pipeline("text-classification", model=str(tmp_path / "run/model"))("Returns a tensor of the same shape.")
    assert answer[0]["label"] in json.loads((tmp_path / "run/model/config.json").read_text())["label2id"]


def test_own_csv_with_string_labels_and_macro_f1(run, tmp_path):
    rows = [("good fine great lovely", "pro"), ("bad awful poor terrible", "contra")] * 20
    lines = [f"{text} {i},{label}\n" for i, (text, label) in enumerate(rows)]
    (tmp_path / "own.csv").write_text("text,label\n" + "".join(lines))
    flags = ("--dataset", tmp_path / "own.csv", "--model", TINY, "--epochs", 8, "--learning-rate", 1e-3, "--batch-size", 8)
    done = run("finetune", "--run-dir", tmp_path / "run", *flags)
    assert "has no test split: a stratified tenth of train is held out as one" in done.stdout
    final = json.loads((tmp_path / "run/metrics.json").read_text())["final"]
    assert final["metric"] == "macro_f1" and final["test/metric"] == final["test/macro_f1"] > 0.9
    assert json.loads((tmp_path / "run/model/config.json").read_text())["id2label"] == {"0": "contra", "1": "pro"}
