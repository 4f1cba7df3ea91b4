"""Copies are identical or differ on purpose; documented commands parse; the scripts stay small."""

import ast
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
# What bears the same name and differs on purpose, and why.
DIFFERENT = {
    "update": "the method itself",
    "load_model": "pre-training needs encoder and decoder, fine-tuning the encoder and a new linear layer",
    "Args": "compared field by field below",
    "RECIPES": "each stage has its own set-up",
    "NAMES": "of the data sets that the script reads",
    "encode": "images and texts, of one name so that the two halves read alike",
    "encode_all": "images and texts",
    "--dataset": "each half has its embedded default and its examples",
    "--steps": "the help says whether it is of a round, and that fine-tuning on texts has epochs",
    "--epochs": "the help says whether it is of a round, and that fine-tuning on images has steps",
    "--teacher": "the script that makes one",
}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def top_level(name):
    """{name: source} of functions, classes and constants."""
    found = {}
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.dump(node)
    return found


def flags(name):
    """[(field, type, default, help)] of Args, in order."""
    body = next(node.body for node in tree(name).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    assert all(isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) for a, b in zip(body[::2], body[1::2], strict=True))
    return [(a.target.id, ast.unparse(a.annotation), a.value and ast.unparse(a.value), b.value.value)
            for a, b in zip(body[::2], body[1::2], strict=True)]  # fmt: skip


def test_copies_of_functions_and_tables_are_identical():
    forms = {}
    for script in SCRIPTS:
        for name, source in top_level(script).items():
            forms.setdefault(name, {}).setdefault(source, []).append(script)
    drifted = {name: list(groups.values()) for name, groups in forms.items() if len(groups) > 1 and name not in DIFFERENT}
    assert not drifted
    assert sum(len(scripts) > 1 for groups in forms.values() for scripts in groups.values()) >= 12  # it did compare something


@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_siblings_differ_in_what_is_the_method_alone(kind):
    """Also in what images and texts do each in their way."""
    one, two = top_level(f"further_pretrain_{kind}"), top_level(f"self_distill_{kind}")
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} == {"update", "Args"}


SECTIONS = {  # in this order in all five scripts, and the functions in them, where a script has them
    "plumbing, shared": "fail interrupt explain refuse_another resolve set_up write optimizer_and_schedule upload average",
    "data, shared": "read_files load_data split_rows",
    "images, shared": "mnist5k decode decode_all rows_of_batches take",
    "texts, shared": "docstrings docstring_rows tokenize_all batches_of_epochs mask_tokens collate",
    "the model": "load_model masked_logits encode as_cuda_graph",
    "looking at the model": "encode_all knn_accuracy picture look scores",
    "THE METHOD": "recadam mars r3f update",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_sections_and_their_functions_have_one_order(name):
    text = (ROOT / f"{name}.py").read_text().replace("THE METHODS", "THE METHOD")
    titles = re.findall(r"^# -{90,} (.*)$", text, re.MULTILINE)
    assert titles == [title for title in SECTIONS if title in titles] and len(titles) >= 6
    found = re.findall(r"^(?:# -{90,} (.*)|def (\w+).*)$", text, re.MULTILINE)
    places, title = [], None
    for heading, function in found:
        title = heading or title
        places += [(title, function)] if function else []
    fixed = [(title, function) for title in titles for function in SECTIONS[title].split()]
    assert places == [place for place in fixed if place in places]


IN_A_STEP = ("update", "masked_logits", "encode", "recadam", "mars", "r3f", "take")


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_in_a_step_waits_for_the_device(name):
    """A value that Python asks for makes it wait for the GPU; the main part does so to log, to look and to start a round."""
    waits = {"item", "tolist", "cpu", "numpy", "nonzero", "any", "all", "synchronize"}
    called = {}
    for node in tree(name).body:
        for part in ast.walk(node) if getattr(node, "name", "") in IN_A_STEP else ():
            if isinstance(part, ast.Call):
                called.setdefault(node.name, set()).add(getattr(part.func, "attr", getattr(part.func, "id", "")))
    assert "update" in called and {"backward", "step"} <= called["update"]
    assert not {function: names & waits for function, names in called.items() if names & waits}


def test_shared_flags_are_identical_and_come_first():
    forms = {}
    for script in SCRIPTS:
        for field, *rest in flags(script):
            forms.setdefault(field, set()).add(tuple(rest))
    assert {f"--{field}" for field, kinds in forms.items() if len(kinds) > 1} <= set(DIFFERENT)
    shared = [field for field, *_ in flags(SCRIPTS[0])][:19]
    assert shared[-1] == "debug"
    for script in SCRIPTS:
        assert [field for field, *_ in flags(script)][:19] == shared


def test_what_the_main_parts_do_for_a_cut_off_run_is_identical():
    """Signals, checkpoints, time, what is written last: tested by killing, in one script or another."""
    keys = ("signal.", 'state.get("', 'state["n"]', "purge_step", "save = ", "resume.pt", "git = ", "versions")
    found = []
    for script in SCRIPTS:
        main = (ROOT / f"{script}.py").read_text().split('if __name__ == "__main__":')[1]
        main = main.replace("signal.signal(signal.SIGINT, interrupt)", "")  # of finetune.py, which loads before set_up
        lines = [line.strip() for line in main.splitlines() if any(key in line for key in keys)]
        found.append([re.sub(r"% (args\.steps|steps|total_steps) ==", "% S ==", line) for line in lines])
    assert len(found[0]) >= 12 and all(lines == found[0] for lines in found)


@pytest.mark.parametrize("kind", ["vit", "roberta"])
def test_the_diff_of_siblings_is_the_method(kind):
    names = [f"further_pretrain_{kind}.py", f"self_distill_{kind}.py"]
    if not all((ROOT / name).exists() for name in names):
        pytest.skip(f"no {kind} scripts")
    done = subprocess.run(["diff", *names], capture_output=True, text=True, cwd=ROOT)
    assert 0 < sum(line[0] in "<>" for line in done.stdout.splitlines()) < 100


def commands(path):
    """Command lines of scripts in the code blocks, tables, sentences and docstrings of a file."""
    text = (ROOT / path).read_text()
    return re.findall(r"(?:^ *|&& |`)(?:\S*python\d?) ((?:\w+/)?\w+\.py[^\n#|`]*)", text, re.MULTILINE)


PLACES = ("*.md", "*.py", "docs/*.md", "pretrained/*/README.md", "pretrained/*.py", "benchmark/*.py")
DOCUMENTS = [str(path.relative_to(ROOT)) for place in PLACES for path in sorted(ROOT.glob(place))]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_documented_commands_parse(path, script, hub):
    found = commands(path)
    assert found or path in ("docs/baselines.md", "docs/datasets.md", "benchmark/table.py")
    import tyro

    for command in found:
        name, *arguments = shlex.split(command)
        assert (ROOT / name).exists(), command
        if "@dataclass" in (ROOT / name).read_text() and "…" not in arguments:
            tyro.cli(script(name.removesuffix(".py")).Args, args=arguments)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_flag(name, script, capsys):
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(script(name).Args, args=["--help"])
    shown = capsys.readouterr().out
    for field, *_ in flags(name):
        assert f"--{field.replace('_', '-')}" in shown


def test_tags_in_the_readme_are_the_tags_in_the_scripts():
    written = set()
    for name in SCRIPTS:
        written |= set(re.findall(r"\"((?:losses|charts|eval)/\w+)\"", (ROOT / f"{name}.py").read_text()))
    documented = set(re.findall(r"`((?:losses|charts|eval)/\w+)`", (ROOT / "README.md").read_text()))
    assert len(written) > 10 and written == documented


def test_nothing_runs_code_from_a_download():
    for name in SCRIPTS:
        text = (ROOT / f"{name}.py").read_text()
        assert "trust_remote_code=True" not in text and "pickle" not in text and "weights_only=False" not in text
        assert len(re.findall(r"torch\.load\(", text)) == len(re.findall(r"torch\.load\([^\n]*weights_only=True", text)) == 1
        assert len(re.findall(r"(?:For\w+|kind)\.from_pretrained\(", text)) == text.count("use_safetensors=True") > 0
        auto = re.findall(r"Auto\w+\.from_pretrained\(|\)\.from_pretrained\(", text)
        assert len(auto) == text.count("trust_remote_code=False") > 0
