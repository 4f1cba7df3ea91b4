"""Every data set of the paper by name, from stand-ins with the real columns, types and splits, and the user's own files."""

import itertools
import json
import zipfile

import numpy as np
import pytest
from conftest import ROOT, images_of, texts_of
from PIL import Image

SHARED = ROOT.parent / "shared/data"  # real data, where it is at hand


def picture(side=12):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side + 4, 3), np.uint8))


def standin(base, name, features, splits, config="default", classes=5):
    """`load_dataset(name)` finds this offline: parquet files of random rows, prepared as the library itself does it."""
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    features, files = datasets.Features(features), {}
    made = {
        datasets.Image: lambda i, feature: picture(), datasets.ClassLabel: lambda i, feature: i % feature.num_classes,
        datasets.Value: lambda i, feature: f"w{i % 90} w{i * 7 % 90} a text number {i}",
    }  # fmt: skip
    for split, n in splits.items():
        rows = {}
        for column, feature in features.items():
            if column == "label" and isinstance(feature, datasets.Value):
                rows[column] = [f"c{i % classes}" for i in range(n)]
            elif type(feature) in made:
                rows[column] = [made[type(feature)](i, feature) for i in range(n)]
            else:
                rows[column] = [[0, 0, 1, 1] for _ in range(n)]
        path = base / f"{name.replace('/', '_')}_{split}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        files[split] = [str(path)]
    made_in = base / "made" / name.replace("/", "___")
    owner, short = name.split("/")
    where = {"cache_dir": str(made_in), "hash": "0123"}
    Parquet(dataset_name=short, config_name=config, data_files=files, **where).download_and_prepare()
    made = next(path for path in made_in.iterdir() if path.is_dir())  # the library writes capitals its own way
    folder = base / "datasets" / f"{owner}___{made.name}"
    folder.parent.mkdir(exist_ok=True)
    made.rename(folder)
    next(folder.glob(f"{config}*")).rename(folder / config)


def real_columns():
    """{name: (columns, splits)} as the cards show them, with few rows: see docs/datasets.md."""
    from datasets import ClassLabel, Image, Sequence, Value

    box, meta = Sequence(Value("float32")), Sequence(Value("int64"))
    three, two = {"train": 110, "validation": 104, "test": 102}, {"train": 205, "test": 201}
    small = {"train": 30, "validation": 10, "test": 12}
    return {
        "aircraft": ({"image": Image(), "bbox": box, "family": ClassLabel(70), "manufacturer": ClassLabel(30),
                      "variant": ClassLabel(100)}, three),
        "cub": ({"image": Image(), "label": ClassLabel(200), "bbox": box}, two),
        "chest_xray": ({"image": Image(), "label": ClassLabel(names=["NORMAL", "PNEUMONIA"])}, small),
        "dtd": ({"image": Image(), "label": ClassLabel(47)}, three),
        "dogs": ({"image": Image(), "label": ClassLabel(120)}, two),
        "flowers": ({"image": Image(), "label": ClassLabel(102)}, three),
        "cifar100": ({"img": Image(), "fine_label": ClassLabel(100), "coarse_label": ClassLabel(20)}, two),
        "chemprot": ({"text": Value("string"), "label": Value("string"), "metadata": meta}, small),
        "acl_arc": ({"text": Value("string"), "label": Value("string")}, small),
        "scierc": ({"text": Value("string"), "label": Value("string"), "metadata": meta}, small),
        "twitter_emotion": ({"text": Value("string"), "label": ClassLabel(names="anger joy optimism sadness".split())}, small),
    }  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(hub):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny")


ALL = "aircraft cub chest_xray dtd dogs flowers cifar100 chemprot acl_arc scierc twitter_emotion".split()


@pytest.mark.parametrize("name", ALL)
def test_each_name_of_the_paper_loads_from_a_standin(script, tokenizer, monkeypatch, capsys, tmp_path, name):
    ft = script("finetune")
    columns, splits = real_columns()[name]
    table = ft.IMAGE_SETS if name in ft.IMAGE_SETS else ft.TEXT_SETS
    row = table[name]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    standin(tmp_path, row[0], columns, splits, row[1].get("name", "default"))
    classes = 5 if table is ft.TEXT_SETS and name != "twitter_emotion" else row[4]
    trained = sum(splits[split] for split in row[5].split("+"))
    monkeypatch.setitem(table, name, (*row[:4], classes, row[5], trained, splits["test"]))
    args = ft.Args(dataset=name)
    data, names = images_of(ft, args, 16) if table is ft.IMAGE_SETS else texts_of(ft, args, tokenizer)
    assert len(names) == classes
    assert [len(samples) for samples, _ in data.values()] == [trained, splits["test"]]
    for samples, labels in data.values():
        assert len(labels) == len(samples) and labels.max() < classes
        assert samples[0].shape == (3, 16, 16) if table is ft.IMAGE_SETS else len(samples[0]) > 2
    monkeypatch.setitem(table, name, (*row[:4], classes, row[5], trained + 1, splits["test"]))
    with pytest.raises(SystemExit):
        images_of(ft, args, 16) if table is ft.IMAGE_SETS else texts_of(ft, args, tokenizer)
    expected = f"{name} from {row[0]}, train: {trained} rows of {classes} classes, expected {trained + 1} of {classes}"
    assert expected in capsys.readouterr().err


def test_digits_and_cifar_are_kept_small_and_enlarged_on_the_device(script):
    import torch

    ft = script("finetune")
    assert ft.SMALL == {"mnist5k": 28, "cifar100": 32}
    image = np.arange(3 * 32 * 32, dtype=np.uint8).reshape(3, 32, 32)
    norm = torch.tensor([[0.5] * 3, [0.25] * 3])[..., None, None]
    found = ft.take([image], np.array([0]), norm, 64)
    slow = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).resize((64, 64), Image.Resampling.BILINEAR))
    slow = torch.from_numpy(slow.copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(found[0] * 0.25 + 0.5, slow, rtol=0, atol=0.6 / 255)


# ------------------------------------------------------------------------------------------------ the user's own
def rows_of(n=20):
    return [{"text": f"a text, number {i}", "label": ("ja", "n\u00e9in")[i % 2]} for i in range(n)]


def arrow(path):
    import pyarrow

    table = pyarrow.Table.from_pylist(rows_of())
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


WRITERS = {
    "d.csv": lambda path: path.write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows_of())),
    "d [1].csv": lambda path: WRITERS["d.csv"](path),  # which read as a pattern is another file's name
    "d.json": lambda path: path.write_text(json.dumps(rows_of())),
    "d.jsonl": lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in rows_of())),
    "d.parquet": lambda path: __import__("datasets").Dataset.from_list(rows_of()).to_parquet(path),
    "d.arrow": lambda path: arrow(path),
    "d.txt": lambda path: path.write_text("".join(f"{r['text']}\n" for r in rows_of())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_own_file_of_texts(script, tokenizer, tmp_path, name):
    WRITERS[name](tmp_path / name)
    module = script("further_pretrain_roberta" if name == "d.txt" else "finetune")
    data, names = texts_of(module, module.Args(dataset=str(tmp_path / name)), tokenizer)
    if name == "d.txt":  # no labels, and nothing held out
        assert data["train"][1] is None and len(data["train"][0]) == 20 and "test" not in data
    else:
        assert names == ["ja", "n\u00e9in"] and [len(samples) for samples, _ in data.values()] == [18, 2]
    assert tokenizer.decode(data["train"][0][0], skip_special_tokens=True).startswith("a text, number")


def test_classes_are_those_of_train_in_their_own_order(script, tokenizer, tmp_path):
    """Numbers count up, 10 after 9; names stand as in the file, without those that no row of train has."""
    import datasets

    module, rows = script("finetune"), [{"text": f"number {i}", "label": i % 12} for i in range(36)]
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    data, names = texts_of(module, module.Args(dataset=str(tmp_path / "d.csv")), tokenizer)
    assert names == [str(i) for i in range(12)] and len(data["train"][1]) == 24
    for ids, label in zip(*data["train"], strict=True):
        assert int(tokenizer.decode(ids, skip_special_tokens=True).split()[-1]) % 12 == label
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["z", "unused", "a"]))
    part = datasets.Dataset.from_dict({"text": [r["text"] for r in rows], "label": [2 * (i % 2) for i in range(36)]}, features)
    part.to_parquet(tmp_path / "d.parquet")
    data, names = texts_of(module, module.Args(dataset=str(tmp_path / "d.parquet")), tokenizer)
    assert names == ["z", "a"] and sorted(np.bincount(data["train"][1])) == [16, 16]


@pytest.mark.parametrize(("text", "label"), [("text", "labels"), ("sentence", "class"), ("content", "target")])
def test_usual_names_of_columns_are_found_among_others(script, tokenizer, tmp_path, text, label):
    rows = [{"other": "no", text: f"yes {i}", label: "ab"[i % 2]} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ft = script("finetune")
    data, names = texts_of(ft, ft.Args(dataset=str(tmp_path / "d.jsonl")), tokenizer)
    assert names == ["a", "b"] and tokenizer.decode(data["test"][0][0], skip_special_tokens=True).startswith("yes")


def test_fewer_samples_do_not_bring_the_held_out_into_training(script, tokenizer, tmp_path):
    (tmp_path / "d.csv").write_text("text,label\n" + "".join(f"text {i},{'xy'[i % 2]}\n" for i in range(40)))
    ft, fr, path = script("finetune"), script("further_pretrain_roberta"), str(tmp_path / "d.csv")
    held = {ids.tobytes() for ids in texts_of(ft, ft.Args(dataset=path), tokenizer)[0]["test"][0]}
    for seed in (1, 2):
        few = {"dataset": path, "max_train_samples": 20, "seed": seed}
        assert {ids.tobytes() for ids in texts_of(ft, ft.Args(**few), tokenizer)[0]["test"][0]} == held
        seen = texts_of(fr, fr.Args(**few), tokenizer, ("train",))[0]["train"][0]
        assert len(seen) == 20 and not held & {ids.tobytes() for ids in seen}


def test_no_more_of_a_text_is_tokenized_than_can_be_read(script):
    import datasets
    from transformers import AutoTokenizer

    tokenizer, seen = AutoTokenizer.from_pretrained(ROOT / "pretrained/roberta-tiny"), []

    class Watched(type(tokenizer)):
        def __call__(self, texts, **flags):
            seen.extend(map(len, texts))
            return super().__call__(texts, **flags)

    tokenizer.__class__ = Watched
    script("finetune").tokenize_all(datasets.Dataset.from_dict({"input": ["word " * 10_000]}), "train", tokenizer, 16)
    assert seen == [50 * 16]


def test_the_digits_are_always_split_alike(script):
    rows = [row["label"] for row in itertools.islice(script("finetune").mnist5k("test"), 12)]
    assert rows == [6, 3, 0, 8, 8, 3, 0, 0, 7, 8, 5, 8]


def test_own_folder_of_splits_and_named_columns(script, tokenizer, tmp_path):
    for split, n in (("train", 8), ("test", 4)):
        rows = [{"title": "no", "body": f"body {i}", "kind": i % 2} for i in range(n)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ft = script("finetune")
    args = ft.Args(dataset=str(tmp_path), input_column="body", label_column="kind")
    data, names = texts_of(ft, args, tokenizer)
    assert names == ["0", "1"] and [len(samples) for samples, _ in data.values()] == [8, 4]
    assert tokenizer.decode(data["test"][0][3], skip_special_tokens=True) == "body 3"
    pretrained, _ = texts_of(script("further_pretrain_roberta"), args, tokenizer, splits=("train",))
    assert list(pretrained) == ["train"]  # the test split is not even read


def test_non_ascii_and_empty_texts(script, tokenizer, tmp_path, capsys):
    rows = [{"text": text} for text in ("\u00fcber \u65e5\u672c\u8a9e \U0001f600", "", None, "  ", "plain")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = script("further_pretrain_roberta")
    data, _ = texts_of(module, module.Args(dataset=str(tmp_path / "d.jsonl")), tokenizer, splits=("train",))
    kept = [tokenizer.decode(ids, skip_special_tokens=True) for ids in data["train"][0]]
    assert "\u00fcber \u65e5\u672c\u8a9e \U0001f600" in kept and "plain" in kept
    assert "samples of train are empty and left out" in capsys.readouterr().out
    (tmp_path / "test").mkdir()  # of a test split none is left out: it is scored as the others are
    for split in ("train", "test"):
        (tmp_path / f"test/{split}.jsonl").write_text((tmp_path / "d.jsonl").read_text())
    data, _ = texts_of(module, module.Args(dataset=str(tmp_path / "test")), tokenizer)
    assert [len(texts) for texts, _ in data.values()] == [3, 5]


@pytest.mark.parametrize("splits", [("train", "test"), ("train",)])
def test_own_image_folder_parquet_and_string_labels(script, tmp_path, splits):
    import datasets

    for split in splits:
        for label in ("\u00e9l\u00e9phant", "zebra"):
            (tmp_path / "d" / split / label).mkdir(parents=True)
            for i in range(12):
                picture().save(tmp_path / "d" / split / label / f"{i}.png")
    ft = script("finetune")
    data, names = images_of(ft, ft.Args(dataset=str(tmp_path / "d")), 16)
    assert names == ["zebra", "\u00e9l\u00e9phant"] and sorted(data) == ["test", "train"]
    assert len(data["train"][0]) == (24 if len(splits) == 2 else 21)
    rows = datasets.Dataset.from_dict({"photo": [picture()] * 24, "class": ["x", "y"] * 12})
    rows.cast_column("photo", datasets.Image()).to_parquet(tmp_path / "d.parquet")
    data, names = images_of(ft, ft.Args(dataset=str(tmp_path / "d.parquet")), 16)
    assert names == ["x", "y"] and len(data["train"][0]) == 21


LAYOUTS = {  # what lies in a folder: (files, rows of train and of test, classes); names of splits count at its top alone
    "names of splits in capitals": (("Train/{a,b}/6.jpg", "Test/{a,b}/3.jpg"), (12, 6), ["a", "b"]),
    "keywords": (("training/{a,b}/6.jpg", "evaluation/{a,b}/3.jpg"), (12, 6), ["a", "b"]),
    "words in names": (("seg_train/{a,b}/6.jpg", "seg_test/{a,b}/3.jpg", "__MACOSX/1.jpg"), (12, 6), ["a", "b"]),
    "numbers after them": (("train_2020/{a,b}/6.jpg", "test2020/{a,b}/3.jpg"), (12, 6), ["a", "b"]),
    "other words": (("Training/{a,b}/6.jpg", "eval/{a,b}/3.jpg", "dev/{a,b}/2.jpg"), (12, 6), ["a", "b"]),
    "in a folder called data": (("data/train/{a,b}/6.jpg", "data/test/{a,b}/3.jpg", "README.md"), (12, 6), ["a", "b"]),
    "in folders of folders": (("a/b/train2017/{a,b}/6.jpg", "a/b/test2017/{a,b}/3.jpg"), (12, 6), ["a", "b"]),
    "a validation split called dev": (("train/{a,b}/10.jpg", "dev/{a,b}/3.jpg"), (18, 2), ["a", "b"]),
    "glued words": (("TrainImages/{a,b}/6.jpg", "TestImages/{a,b}/3.jpg", "oldTrain/{a,b}/2.jpg"), (16, 6), ["a", "b"]),
    "an unlabelled split that is not used": (("train/{a,b}/6.jpg", "test/{a,b}/3.jpg", "val/3.jpg"), (12, 6), ["a", "b"]),
    "as downloaded": (("data/train/{a,b}/6.jpg", "data/test/{a,b}/3.jpg", ".cache/x.json", "infos.json"), (12, 6), ["a", "b"]),
    "a class called test": (("train/{good,test}/6.jpg", "test/{good,test}/6.jpg"), (12, 12), ["good", "test"]),
    "a class called test run": (("train/{car,test run}/6.jpg", "test/{car,test run}/6.jpg"), (12, 12), ["car", "test run"]),
    "a file of each image's words": (("train/{a,b}/6.jpg", "train/{a,b}/6.txt", "test/{a,b}/3.jpg"), (12, 6), ["a", "b"]),
    "lists beside the images": (("images/{a,b}/20.jpg", "train.txt", "test.txt", "labels.csv"), (36, 4), ["a", "b"]),
    "a class called test, no splits": (("test/20.jpg", "cars/20.jpg"), (36, 4), ["cars", "test"]),
    "csv": (("Train_data.csv", "Test_data.csv", "notes.txt"), (12, 6), ["x", "y"]),
    "csv with a licence": (("train.csv", "test.csv", "LICENSE", "notes.md", "get.py"), (12, 6), ["x", "y"]),
    "csv in parts": (("train-00000-of-00002.csv", "train-00001-of-00002.csv", "test.csv"), (24, 6), ["x", "y"]),
    "csv in a folder called data": (("data/sst_train.csv", "data/sst_test.csv", "README.md"), (12, 6), ["x", "y"]),
    "a picture beside train alone": (("train/{a,b}/12.jpg", "1.jpg"), (21, 3), ["a", "b"]),
    "csv of which none says train": (("sst_test.csv", "more.csv"), (16, 2), ["x", "y"]),
    "csv as downloaded": (("data/train.csv", "data/test.csv", ".git/HEAD", "infos.json"), (12, 6), ["x", "y"]),
}  # fmt: skip


def lay(base, files):
    for name in files:
        head, _, tail = name.partition("{")
        for inner in tail.partition("}")[0].split(",") if tail else [""]:
            path = base / (head + inner + tail.partition("}")[2] if tail else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".csv":
                n = 6 if "test" in path.stem.lower() else 12
                path.write_text("text,label\n" + "".join(f"{path.stem} {i},{'xy'[i % 2]}\n" for i in range(n)))
            elif path.stem.isdecimal():
                for i in range(int(path.stem)):
                    target = path.with_name(f"{i}{path.suffix}")
                    picture().save(target) if path.suffix == ".jpg" else target.write_text("a caption")
            else:
                path.write_text("0.jpg 1\n")
    return base


UNCLEAR = {  # what would train on a test, or leave most out, is refused
    "an image beside data": (("data/train/{a,b}/6.jpg", "data/test/{a,b}/3.jpg", "1.jpg"), "train and test lie in its "),
    "train and validation deeper down": (("de/train.csv", "de/val.csv", "en/train.csv"), "train and test lie in its folder "),
    "two of everything": (("de/train.csv", "de/test.csv", "en/train.csv", "en/test.csv"), "train and test lie in its folder "),
    "a folder train that is none": (("training_data/train/2.jpg", "training_data/test/2.jpg"), "train and test lie in its "),
    "a class called train": (("bus/6.jpg", "car/6.jpg", "train/6.jpg"), "its folder train lies beside others of images"),
}  # fmt: skip


@pytest.mark.parametrize("layout", UNCLEAR)
def test_a_folder_of_which_nobody_knows_what_is_train_is_refused(script, tmp_path, capsys, layout):
    files, line = UNCLEAR[layout]
    fp = script("further_pretrain_vit")
    with pytest.raises(SystemExit):
        images_of(fp, fp.Args(dataset=str(lay(tmp_path / "d", files))), 16, ("train",))
    assert f"error: cannot load {tmp_path}/d: {line}" in capsys.readouterr().err


@pytest.mark.parametrize("files", [("test/6.jpg",), ("test/{a,b,c}/2.jpg",), ("test/metadata.csv", "test/6.jpg")])
def test_a_split_that_is_not_used_changes_nothing(script, tmp_path, capsys, files):
    fp = script("further_pretrain_vit")
    lay(tmp_path / "d", ("train/{a,b}/6.jpg", *files))
    if len(files) == 2:
        (tmp_path / "d/test/metadata.csv").write_text("file_name,other\n" + "".join(f"{i}.jpg,1\n" for i in range(6)))
    data, names = images_of(fp, fp.Args(dataset=str(tmp_path / "d")), 16, ("train",))
    assert len(data["train"][0]) == 12 and list(np.bincount(data["train"][1])) == [6, 6] and names == ["a", "b"]
    assert capsys.readouterr().out == f"{tmp_path}/d: not used here: test\n"


def test_what_lies_beside_the_data_is_not_the_data(script, tokenizer, tmp_path, capsys):
    """A picture of a cloned Hub repository, what the library itself leaves in a folder, a mark of the byte order."""
    import datasets

    ft, fr = script("finetune"), script("further_pretrain_roberta")
    rows = {"image": [picture()] * 12, "label": ["x", "y"] * 6}
    (tmp_path / "hub/data").mkdir(parents=True)
    for split in ("train", "test"):
        part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        part.to_parquet(tmp_path / f"hub/data/{split}-00000-of-00001.parquet")
    picture().save(tmp_path / "hub/preview.png")
    data, names = images_of(ft, ft.Args(dataset=str(tmp_path / "hub")), 16)
    assert [len(images) for images, _ in data.values()] == [12, 12] and names == ["x", "y"]
    lay(tmp_path / "listed", ("6.jpg",))  # a list of images may be parquet too
    listed = {"file_name": [f"{i}.jpg" for i in range(6)], "label": list("xyxyxy")}
    datasets.Dataset.from_dict(listed).to_parquet(tmp_path / "listed/metadata.parquet")
    data, names = images_of(script("further_pretrain_vit"), ft.Args(dataset=str(tmp_path / "listed")), 16, ("train",))
    assert len(data["train"][0]) == 4 and names == ["x", "y"]
    datasets.Dataset.from_list(rows_of()).save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").map(lambda row: row | {"length": len(row["text"])})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    data, _ = texts_of(ft, ft.Args(dataset=str(tmp_path / "saved")), tokenizer)
    assert [len(texts) for texts, _ in data.values()] == [18, 2]
    datasets.Dataset.from_list(rows_of()).to_parquet(tmp_path / "metadata.parquet")  # a list of images beside them alone
    data, _ = texts_of(ft, ft.Args(dataset=str(tmp_path / "metadata.parquet")), tokenizer)
    assert [len(texts) for texts, _ in data.values()] == [18, 2]
    with zipfile.ZipFile(lay(tmp_path / "unpacked", ("train/{a,b}/6.jpg", "test/{a,b}/3.jpg")) / "all.zip", "w") as archive:
        archive.writestr("train/a/0.jpg", "where they came from")
    data, _ = images_of(ft, ft.Args(dataset=str(tmp_path / "unpacked")), 16)
    assert [len(images) for images, _ in data.values()] == [12, 6]
    (tmp_path / "d.txt").write_text("first\nsecond\n", encoding="utf-8-sig")
    data, _ = texts_of(fr, fr.Args(dataset=str(tmp_path / "d.txt")), tokenizer, ("train",))
    assert tokenizer.decode(data["train"][0][0], skip_special_tokens=True) == "first"
    (tmp_path / "two.csv").write_text("text,label\n" + "a word,x\n" * 9 + "one,rare\n" * 2)
    data, _ = texts_of(fr, fr.Args(dataset=str(tmp_path / "two.csv")), tokenizer, ("train",))
    assert len(data["train"][0]) == 9  # what finetune.py will be tested on is left out
    (tmp_path / "d.csv").write_text("text,label\n" + "a word,x\n" * 9 + "one,rare\n")
    capsys.readouterr()
    data, _ = texts_of(fr, fr.Args(dataset=str(tmp_path / "d.csv")), tokenizer, ("train",))
    assert len(data["train"][0]) == 10 and "has a class of one sample: all of it is trained on" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["d [1]/d.csv", "d [1]", "."])
def test_a_path_may_be_relative_and_look_like_a_pattern(script, tokenizer, tmp_path, monkeypatch, name):
    (tmp_path / "d [1]").mkdir()
    WRITERS["d.csv"](tmp_path / "d [1]/d.csv")
    monkeypatch.chdir(tmp_path / "d [1]" if name == "." else tmp_path)
    ft = script("finetune")
    data, names = texts_of(ft, ft.Args(dataset=name), tokenizer)
    assert names == ["ja", "n\u00e9in"] and [len(samples) for samples, _ in data.values()] == [18, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_top_of_a_folder_says_what_is_train_and_what_is_test(script, tokenizer, tmp_path, layout):
    files, rows, classes = LAYOUTS[layout]
    ft = script("finetune")
    args = ft.Args(dataset=str(lay(tmp_path / "d", files)))
    data, names = texts_of(ft, args, tokenizer) if "csv" in layout else images_of(ft, args, 16)
    assert (tuple(len(data[split][0]) for split in ("train", "test")), names) == (rows, classes)


@pytest.mark.parametrize("inside", [True, False])
def test_labels_of_a_list_of_images_count_where_the_library_reads_it(script, tmp_path, capsys, inside):
    """A metadata.jsonl in the folder of each split is read with it; one beside the splits is not, which is said. (A csv is
    the same, but not for datasets 4.0 with pandas 3, whose strings it does not take for strings.)"""
    rows = [(f"{i}.jpg", "xy"[i % 2]) for i in range(4)]
    for split in ("train", "test"):
        (tmp_path / "d" / split).mkdir(parents=True)
        for name, _ in rows:
            picture().save(tmp_path / "d" / split / name)
        lines = [{"file_name": name if inside else f"{split}/{name}", "label": label} for name, label in rows]
        place = tmp_path / "d" / split if inside else tmp_path / "d"
        (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = script("further_pretrain_vit").read_files(tmp_path / "d", ("train", "test"))
    assert {split: len(part) for split, part in found.items()} == {"train": 4, "test": 4}
    assert "label" not in found["train"].features if not inside else list(found["train"]["label"]) == list("xyxy")
    said = capsys.readouterr().out
    assert "are not read" not in said if inside else "1 of its 9 files are not read" in said
    lay(tmp_path / "one", ("images/4.jpg",))  # a list beside the only folder, which it names
    lines = [{"file_name": f"images/{name}", "label": label} for name, label in rows]
    (tmp_path / "one/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(script("further_pretrain_vit").read_files(tmp_path / "one", ("train",))["train"]["label"]) == list("xyxy")


def test_files_are_read_in_the_order_of_their_names(script, tmp_path):
    """Not in that of a set, which is another in each process: a seed would mean another order of the data."""
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"{i}\n")
    assert list(script("further_pretrain_roberta").read_files(tmp_path, ("train",))["train"]["text"]) == list("012345678")


def test_a_hub_set_without_usual_splits_says_which_are_left_out(script, tokenizer, tmp_path, monkeypatch, capsys):
    import datasets

    parts = {name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(n)]}) for name, n in (("a", 5), ("b", 3))}
    module = script("further_pretrain_roberta")
    monkeypatch.setattr(module.datasets, "load_dataset", lambda name: datasets.DatasetDict(parts))
    data, _ = texts_of(module, module.Args(dataset="some/name"), tokenizer, ("train",))
    assert len(data["train"][0]) == 5 and "some/name: not used here: b\n" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "expected"), [(40000, 155), (65535, 255), (70000, None), (-1, None)])
def test_pixels_of_more_than_16_bits_are_refused_not_wrapped(script, tmp_path, value, expected):
    decode = script("further_pretrain_vit").decode
    Image.fromarray(np.full((4, 4), value, np.int32)).save(tmp_path / "a.tiff")
    row = {"input": {"path": str(tmp_path / "a.tiff"), "bytes": None}}
    if expected is None:
        with pytest.raises(ValueError, match="neither of 8 bits nor of 16"):
            decode(row, 0, 4)
    else:
        assert set(decode(row, 0, 4)["pixels"].tolist()) == {expected}


def test_a_folder_of_links_is_read_and_hidden_files_are_not(script, tokenizer, tmp_path):
    for split, n in (("train", 6), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / "far" / split / name).mkdir(parents=True)
            for i in range(n):
                picture().save(tmp_path / "far" / split / name / f"{i}.jpg")
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / split).symlink_to(tmp_path / "far" / split)
    (tmp_path / "d/.cache").mkdir()
    picture().save(tmp_path / "d/.cache/train.jpg")
    ft = script("finetune")
    data, names = images_of(ft, ft.Args(dataset=str(tmp_path / "d")), 16)
    assert ([len(samples) for samples, _ in data.values()], names) == ([12, 6], ["a", "b"])
    (tmp_path / "t/.checkpoints").mkdir(parents=True)
    for name in ("a.txt", ".checkpoints/b.txt", ".c.txt"):
        (tmp_path / "t" / name).write_text("a text\n")
    fr = script("further_pretrain_roberta")
    data, _ = texts_of(fr, fr.Args(dataset=str(tmp_path / "t")), tokenizer, ("train",))
    assert len(data["train"][0]) == 1


LABELS = {  # values of a column, and what becomes of them
    "words that pandas takes for missing": ("csv", ["NA", "None"], ["NA", "None"], ""),
    "negative numbers": ("csv", [-1, 1], ["-1", "1"], ""),
    "truth": ("json", [True, False], ["False", "True"], ""),
    "a missing one": ("csv", ["x", ""], [], "train is taken as unlabelled: label is missing in 10 rows"),
    "several a row": ("json", [["x", "y"], ["x"]], [], "of type list, is not a class"),
    "several as a vector": ("json", [[0, 1, 1], [1, 0, 1]], [], "of type list, is not a class"),
    "fields": ("json", [{"name": "x"}, {"name": "y"}], [], "of type list, is not a class"),
    "scores": ("csv", [0.25, 0.5], [], "of type float, is not a class"),
    "scores in json": ("json", [0.25, 0.5], [], "of type float, is not a class"),
    "a number among names": ("csv", ["3.11", "x"], ["3.11", "x"], ""),
    "numbers with zeros before them": ("csv", ["001", "1"], ["001", "1"], ""),
}


@pytest.mark.parametrize("case", LABELS)
def test_what_is_a_class(script, tokenizer, tmp_path, capsys, case):
    """Neither lists nor scores are: such a set is taken as unlabelled, and finetune.py ends with a word on labels."""
    kind, values, classes, said = LABELS[case]
    rows = [{"text": f"a text {i}", "label": values[i % 2]} for i in range(20)]
    lines = [json.dumps(row) if kind == "json" else f"{row['text']},{row['label']}" for row in rows]
    lines = ["text,label"] * (kind == "csv") + lines
    (tmp_path / f"d.{kind}").write_text("\n".join(lines))
    fr = script("further_pretrain_roberta")
    data, names = texts_of(fr, fr.Args(dataset=str(tmp_path / f"d.{kind}")), tokenizer, ("train",))
    assert names == classes and (data["train"][1] is None) == (not classes)
    assert said in capsys.readouterr().out and len(data["train"][0]) == (18 if classes else 20)


@pytest.mark.parametrize("flags", [{}, {"label_column": "kind"}])
def test_labels_of_a_csv_are_what_is_written_in_all_its_files_and_parts(script, tokenizer, tmp_path, flags):
    """The library guesses a column's type anew in each file and each 10,000 rows, and turns 001 into 1 and True into true."""
    (tmp_path / "d").mkdir()
    parts = {"train-1": ["A1", "001", "True"] * 4000 + ["001"] * 9000, "train-2": ["001", "True"], "test": ["True", "True"]}
    for name, labels in parts.items():
        rows = [f"text {i},{label},7" for i, label in enumerate(labels)]
        (tmp_path / f"d/{name}.csv").write_text("\n".join([f"text,{flags.get('label_column', 'label')},other", *rows]))
    fr = script("further_pretrain_roberta")
    data, names = texts_of(fr, fr.Args(dataset=str(tmp_path / "d"), **flags), tokenizer)
    counts = {
        split: dict(zip(names, np.bincount(labels, minlength=3).tolist(), strict=True)) for split, (_, labels) in data.items()
    }
    assert counts == {"train": {"001": 13001, "A1": 4000, "True": 4001}, "test": {"001": 0, "A1": 0, "True": 2}}


def test_a_class_of_empty_texts_alone_does_not_keep_the_held_out_tenth_in_training(script, tokenizer, tmp_path):
    rows = [{"text": "", "label": "a"}] * 4 + [{"text": f"a text {i}", "label": "bc"[i % 2]} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fr = script("further_pretrain_roberta")
    kinds = [("train",), ("train", "test")]  # as in pre-training, as in fine-tuning
    one, two = (texts_of(fr, fr.Args(dataset=str(tmp_path / "d.jsonl")), tokenizer, splits)[0]["train"][0] for splits in kinds)
    assert len(one) == 36 and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    data, names = texts_of(fr, fr.Args(dataset=str(tmp_path / "d.jsonl")), tokenizer)
    for samples, labels in data.values():  # and each text keeps its own label
        numbers = [int(tokenizer.decode(ids, skip_special_tokens=True).split()[-1]) for ids in samples]
        assert [names[label] for label in labels] == ["bc"[i % 2] for i in numbers]


def test_few_samples_can_be_drawn_where_they_cannot_be_stratified(script, tokenizer, tmp_path):
    rows = [{"text": f"a text {i}", "label": "bc"[i % 2]} for i in range(40)]
    fr = script("further_pretrain_roberta")
    for n, more in (
        (20, [{"text": "alone", "label": "a"}]),
        (39, []),
    ):  # a class of one sample; a rest of less than one of each
        (tmp_path / f"{n}.jsonl").write_text("\n".join(map(json.dumps, rows + more)))
        (tmp_path / f"{n}/test").mkdir(parents=True)
        for split, part in (("train", rows + more), ("test", rows[:4])):
            (tmp_path / f"{n}/{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
        data, _ = texts_of(fr, fr.Args(dataset=str(tmp_path / str(n)), max_train_samples=n), tokenizer)
        assert len(data["train"][0]) == n and len({ids.tobytes() for ids in data["train"][0]}) == n
        all_of_them = fr.Args(dataset=str(tmp_path / str(n)), max_train_samples=len(rows + more))
        assert len(texts_of(fr, all_of_them, tokenizer)[0]["train"][0]) == len(rows + more)


def test_images_are_decoded_once_for_all_runs_stages_and_seeds(script, tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    for i in range(6):
        picture().save(tmp_path / f"d/{i}.png")
    count, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: count.append(1) or opened(*a, **k))
    found = []
    for name, seed in (("further_pretrain_vit", 1), ("self_distill_vit", 2)):
        module = script(name)
        data, _ = images_of(module, module.Args(dataset=str(tmp_path / "d"), seed=seed, max_train_samples=5), 16, ("train",))
        found.append(len(count))
    assert found[0] == found[1] > 0
    data, _ = images_of(module, module.Args(dataset=str(tmp_path / "d")), 16, ("train",))
    one, next_one, *_ = data["train"][0]  # side by side in the mapped file: no copies
    assert next_one.ctypes.data - one.ctypes.data == one.nbytes == 3 * 16 * 16
    images_of(module, module.Args(dataset=str(tmp_path / "d")), 8, ("train",))  # another size is another cache
    assert len(count) == 2 * found[0]
    monkeypatch.setattr(module.inspect, "getsource", lambda _: "changed")  # and so is another way to decode
    images_of(module, module.Args(dataset=str(tmp_path / "d")), 8, ("train",))
    assert len(count) == 3 * found[0]


@pytest.mark.parametrize("name", ["scierc", pytest.param("acl_arc", marks=pytest.mark.slow)])
def test_real_texts_are_trained_on_for_a_few_steps(run, tmp_path, name):
    if not (SHARED / "text" / name).exists():
        pytest.skip("the shared data is not here")
    flags = ("--dataset", SHARED / "text" / name, "--epochs", 1, "--eval-every", 0, "--max-train-samples", 200)
    tiny = ROOT / "pretrained/roberta-tiny"
    run("self_distill_roberta", *flags, "--model", tiny, "--batch-size", 32, "--run-dir", tmp_path / "run")
    run("finetune", *flags, "--run-dir", tmp_path / "tuned", "--model", tmp_path / "run/model")
    final = json.loads((tmp_path / "tuned/metrics.json").read_text())["final"]
    assert final["metric"] == "macro_f1" and 0 < final["test/metric"] < 1


@pytest.mark.parametrize("name", ["flowers102_64px", pytest.param("cub100_227px", marks=pytest.mark.slow)])
def test_real_images_are_trained_on_for_a_few_steps(run, tmp_path, name):
    if not (SHARED / "images" / name).exists():
        pytest.skip("the shared data is not here")
    flags = ("--dataset", SHARED / "images" / name, "--model", ROOT / "pretrained/vit-mae-tiny", "--eval-every", 0)
    run("further_pretrain_vit", *flags, "--steps", 2, "--batch-size", 8, "--run-dir", tmp_path / "run")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["final"]["losses/total"] < 1
