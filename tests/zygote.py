"""Runs scripts in forks of one process that has the libraries loaded, and hurts them at a chosen moment.

A line of JSON on stdin is one run: {"script", "argv", "out", "err"}, and if wanted "cwd", "cache", "hook", "port" (two
processes that meet there, in the environment that torchrun would give them; if one fails, the other is ended); a line on
stdout is its exit code (-9 for SIGKILL) and the names of the moments that it passed. A moment is a call that may be cut off:
an optimizer step, each half of a checkpoint, a sync, a rename, a saved model, a decoded image. hook: {"kind", "at"}, what
happens at moment number `at`.
"""

import io
import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import datasets
import PIL.Image
import sklearn.model_selection  # noqa: F401
import torch
import torch.utils.tensorboard
import torchvision  # noqa: F401
import transformers
import tyro  # noqa: F401

LAZY = ["ViTMAEForPreTraining", "ViTForImageClassification", "AutoModelForMaskedLM", "AutoImageProcessor", "ViTImageProcessor"]
for name in [*LAZY, "RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaTokenizerFast"]:
    getattr(transformers, name)  # loaded when first asked for, otherwise in each fork anew


def watch(hook: dict, passed: list[str], run_dir: str) -> None:
    """Count the moments, and do what `hook` says at one of them."""
    step, save, sync, rename = torch.optim.AdamW.step, torch.save, os.fsync, os.replace
    save_pretrained, resize = transformers.PreTrainedModel.save_pretrained, PIL.Image.Image.resize

    def moment(name, optimizer=None):
        passed.append(name)
        if len(passed) != hook.get("at"):
            return
        if hook["kind"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if hook["kind"] == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if hook["kind"] == "twice":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        if hook["kind"] == "interrupt":  # as Ctrl-C in a terminal: the workers that decode get it as well
            os.killpg(0, signal.SIGINT)
        if hook["kind"] == "interrupt one":  # as `kill`, or a button: the process alone that leads the group
            os.write(1, f"group {os.getpgrp()}\n".encode())
            os.kill(os.getpgrp(), hook["signal"])
        if hook["kind"] == "delete":
            shutil.rmtree(run_dir)
        if hook["kind"] == "full":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        if hook["kind"] == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of ...")
        if hook["kind"] == "nan":
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    def stepped(self, *args, **kwargs):
        moment("step", self)
        return step(self, *args, **kwargs)

    def saved(content, file, **kwargs):
        save(content, buffer := io.BytesIO(), **kwargs)
        whole = buffer.getvalue()
        with open(file, "wb") as target:
            target.write(whole[: len(whole) // 2])
            target.flush()
            moment("half a checkpoint")
            target.write(whole[len(whole) // 2 :])

    def synced(number):
        moment("before sync")
        sync(number)

    def renamed(source, target):
        moment(f"before rename to {Path(target).name}")
        rename(source, target)
        moment(f"after rename to {Path(target).name}")

    def model_saved(self, *args, **kwargs):
        save_pretrained(self, *args, **kwargs)
        moment("model saved")

    def resized(self, *args, **kwargs):
        if hook.get("decode"):
            moment("decode")
        return resize(self, *args, **kwargs)

    torch.optim.AdamW.step, torch.save, os.fsync, os.replace = stepped, saved, synced, renamed
    transformers.PreTrainedModel.save_pretrained, PIL.Image.Image.resize = model_saved, resized


def child(job: dict, report: Path) -> None:
    for path, number in ((job["out"], 1), (job["err"], 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.setpgid(0, 0)
    os.chdir(job.get("cwd", "."))
    if job.get("cache"):
        datasets.config.HF_DATASETS_CACHE = Path(job["cache"])
    passed, code = [], 0
    if "hook" in job:
        watch(job["hook"], passed, job["argv"][job["argv"].index("--run-dir") + 1])
    sys.argv = [job["script"], *job["argv"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        try:
            code = 1
            sys.excepthook(*sys.exc_info())
        except SystemExit as stopped:  # the scripts' own hook
            code = stopped.code
    sys.stdout.flush()
    sys.stderr.flush()
    report.write_text(json.dumps(passed))
    os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        report = Path(job["out"] + ".passed")  # a file: a pipe would stay open in processes that a run leaves behind
        status, running = 0, {}
        for rank in range(2 if "port" in job else 1):
            if (number := os.fork()) == 0:
                if "port" in job:
                    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"]), "WORLD_SIZE": "2"}
                    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                child(job, report)
            running[number] = rank
        while running:
            number, ended = os.wait()
            if running.pop(number, None) is not None and not status:
                status = os.waitstatus_to_exitcode(ended)
                for other in running if status else ():
                    os.kill(other, signal.SIGTERM)
        passed = json.loads(report.read_text()) if report.exists() else []
        print(json.dumps({"code": status, "passed": passed}), flush=True)
