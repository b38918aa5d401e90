"""Inputs that cannot work, each as a user would come to have it. Run as a module it writes docs/bad_inputs.md."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving.servers import a_bench, free_port, serving
from transformers import AutoTokenizer, BertConfig, T5Config

from commands.own import SUMS, save_model, shipped_tokenizer, write_rows
from commands.running import Finished, here

Make = Callable[[Path], "list[str] | contextlib.AbstractContextManager[list[str]] | None"]


@dataclass(frozen=True)
class Bad:
    """One input: what it is, the words of the command line, and what lies in the folder that it runs in.

    ``make`` writes files and may return further words, or a context that gives them (a server). ``loads`` says that
    models have to be loaded for it to be found; ``when`` skips it where the machine cannot have it.
    """

    what: str
    words: tuple[str, ...] = ()
    make: Make | None = None
    loads: bool = False
    needs: str | None = None

    @contextlib.contextmanager
    def made(self, folder: Path) -> Iterator[list[str]]:
        """Have the input in ``folder``; yield the words of the command line."""
        more = self.make(folder) if self.make else None
        with (
            more
            if isinstance(more, contextlib.AbstractContextManager)
            else contextlib.nullcontext(more) as words
        ):
            yield [*self.words, *(words or [])]


def stable(sentence: str) -> str:
    """Return a sentence without what differs between machines and releases: ports, sizes, others' own words."""
    sentence = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", sentence)
    sentence = re.sub(r"\d[\d.e+]* GB", "… GB", sentence)
    sentence = re.sub(r"the disk of \S+ must", "the disk of … must", sentence)
    sentence = re.sub(r"must be one of .+?, got", "must be one of …, got", sentence)
    sentence = re.sub(r"use one of .+ \(a preset", "use one of … (a preset", sentence)
    others = "transformers says|Error while|Expecting|'utf-8'|Could not open|ConnectError|\\[Errno|invalid"
    return re.sub(rf"\((?:{others}).*\)", "(…)", sentence)


# -- files


def rows(content: str | bytes | None, name: str = "rows.jsonl") -> Make:
    """A file of problems."""

    def make(folder: Path) -> None:
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def unreadable(folder: Path) -> None:
    (folder / "rows.jsonl").symlink_to("/proc/self/mem")  # root may read everything else


def parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["a"]}), folder / "rows.parquet")


def with_template(folder: Path) -> list[str]:
    tokenizer = shipped_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    save_model(folder / "model", tokenizer=tokenizer)
    write_rows(folder / "rows.jsonl", [{"messages": [{"role": "system", "content": "a"}]}])
    return ["student.path=./model", "teacher.path=./model"]


OWN = ("task=jsonl", "task.path=rows.jsonl")
FILES = [
    Bad("a file that is not there", OWN),
    Bad("an empty file", OWN, rows("")),
    Bad("a file of blank lines", OWN, rows("\n\n")),
    Bad("a line that is no JSON", OWN, rows('{"prompt": "a"}\n{"prompt": \n')),
    Bad("a line that is no object", OWN, rows("[1, 2]\n")),
    Bad("a line in another encoding", OWN, rows(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')),
    Bad("a row without a prompt", OWN, rows('{"prompt": "a"}\n{"question": "b"}\n')),
    Bad("messages that are no chat", OWN, rows('{"messages": ["a"]}\n')),
    Bad(
        "messages that end with the answer",
        OWN,
        rows('{"messages": [{"role": "assistant", "content": "b"}]}\n'),
    ),
    Bad("a file of another kind", ("task=jsonl", "task.path=rows.csv"), rows("prompt\na\n", "rows.csv")),
    Bad(
        "a folder in place of a file",
        ("task=jsonl", "task.path=."),
    ),
    Bad("a file that cannot be read", OWN, unreadable, needs="/proc/self/mem"),
    Bad(
        "a parquet file that is none",
        ("task=jsonl", "task.path=rows.parquet"),
        rows("PAR", "rows.parquet"),
        needs="pyarrow",
    ),
    Bad(
        "a parquet file without a prompt column",
        ("task=jsonl", "task.path=rows.parquet"),
        parquet,
        needs="pyarrow",
    ),
    Bad(
        "a held-out file that is broken",
        ("task=jsonl", "task.path=rows.jsonl", "task.val_path=held.jsonl"),
        lambda f: (rows('{"prompt": "a"}\n')(f), rows("{", "held.jsonl")(f))[0],
    ),
    Bad("no file named", ("task=jsonl",)),
    Bad(
        "prompts that are all too long",
        (*OWN, "collector.max_prompt_tokens=5"),
        lambda f: write_rows(f / "rows.jsonl", SUMS) and None,
    ),
    Bad("messages that the chat template refuses", OWN, with_template),
]

# -- settings

SETTINGS = [
    Bad("a key that is not there", ("nonsense=1",)),
    Bad("a key with a plus that nothing reads", ("+nonsense=1",)),
    Bad("a key in the wrong place", ("max_steps=7",)),
    Bad("a typo in a key", ("rollout.max_new_token=64",)),
    Bad("a typo in an option", ("estimator=topkk",)),
    Bad("a key of an option that is not chosen", ("estimator.gamma=0.5",)),
    Bad("a setting that a part does not take", ("+estimator.nonsense=1",)),
    Bad("an option null", ("support=null",)),
    Bad("an override without a value", ("seed",)),
    Bad("several values without a multirun", ("seed=0,1",)),
    Bad("one part twice", ("mask=[special_tokens,special_tokens]",)),
    Bad("a list in place of a number", ("optimizer.lr=[1,2]",)),
    Bad("a text in place of a number", ("rollout.samples=many",)),
    Bad("a list in place of a length", ("rollout.max_new_tokens=[8,16]",)),
    Bad("a fraction of a step", ("trainer.max_steps=1.5",)),
    Bad("a negative number of steps", ("trainer.max_steps=-1",)),
    Bad("a negative learning rate", ("optimizer.lr=-1",)),
    Bad("a learning rate that is no number", ("optimizer.lr=nan",)),
    Bad("a discount that is no number", ("estimator=discounted", "estimator.gamma=nan")),
    Bad("a temperature that is no number", ("rollout.temperature=nan",)),
    Bad("a negative clipping norm", ("trainer.gradient_clip_val=-1",)),
    Bad("a negative seed", ("seed=-1",)),
    Bad("an estimator without the support that it compares on", ("estimator=topk", "support=none")),
    Bad("a divergence over a single token", ("support=sampled",)),
    Bad("more tokens at a position than the vocabulary has", ("support.k=100000",)),
    Bad("a divergence of an estimator that has none", ("estimator=token", "divergence=jsd")),
    Bad("a part that teaches nobody's tokens", ("regularizer=[imitation]",)),
    Bad("whole vocabularies from a server", ("support=full", "teacher=served")),
    Bad(
        "the student's ids from a server of top ids",
        ("support=student", "teacher=vllm_server", "teacher.path=builtin:word_problems/teacher"),
    ),
    Bad("two scoring temperatures", ("teacher.scoring_temperature=2",)),
    Bad("a self-teacher that is the student", ("teacher=self", "teacher.context=null")),
    Bad("prompts that do not divide into steps", ("collector.prompts_per_collection=5",)),
    Bad("a micro-batch below the longest row", ("collector.micro_batch_tokens=600",)),
    Bad("weights of a type that cannot be trained", ("student.dtype=int8",)),
    Bad("a precision that casts the batches", ("trainer.precision=bf16-true",)),
    Bad("an accelerator that is none", ("trainer.accelerator=quantum",)),
    Bad("a GPU where there is none", ("trainer=gpu",), needs="no gpu"),
    Bad("processes in a multirun", ("-m", "seed=0", "trainer.devices=2")),
    Bad("prompts that do not divide over processes", ("strategy=ddp", "trainer.devices=3")),
    Bad("an evaluation longer than the context", ("evaluation.settings.max_new_tokens=5000",)),
    Bad("rollouts longer than the context", ("rollout.max_new_tokens=4000",)),
]

# -- models

MODEL = ("student.path=./model",)


def model(change: Callable[[Path], Any], **more: Any) -> Make:
    """A saved model, then changed."""

    def make(folder: Path) -> None:
        change(save_model(folder / "model", **more))

    return make


def configured(**settings: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


def without(*names: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        for file in [file for name in names for file in folder.glob(name)]:
            file.unlink()

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def sharded(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def thinned(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_kind(config: Any, architecture: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config.architectures = [architecture]
        config.save_pretrained(folder)

    return change


def swapped(folder: Path) -> None:
    """Two ids of ordinary tokens change places."""
    shipped_tokenizer().save_pretrained(folder / "tokenizer")
    file = folder / "tokenizer" / "tokenizer.json"
    state = json.loads(file.read_text())
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(state))
    save_model(folder / "model", tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))


def silent(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("eos_token")
    file.write_text(json.dumps(settings))


def coded(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('code of the checkpoint was run')")
    configured(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})(
        folder
    )


LARGE = {"num_hidden_layers": 64, "hidden_size": 2**14, "intermediate_size": 2**17, "layer_types": None}
MODELS = [
    Bad("a model folder that is not there", ("student.path=./nowhere",)),
    Bad("a folder without a model", ("teacher.path=./empty",), lambda f: (f / "empty").mkdir()),
    Bad("a name that no hub answers to", ("student.path=no/such-model",)),
    Bad("a config.json that is no JSON", MODEL, model(lambda f: (f / "config.json").write_text("{"))),
    Bad("a config.json that contradicts itself", MODEL, model(configured(num_hidden_layers=16))),
    Bad("a model of an unknown kind", MODEL, model(configured(model_type="nonsense"))),
    Bad("an encoder", MODEL, model(of_kind(BertConfig(), "BertForMaskedLM"))),
    Bad("an encoder with a decoder", MODEL, model(of_kind(T5Config(), "T5ForConditionalGeneration"))),
    Bad("a classifier", MODEL, model(configured(architectures=["Qwen3ForSequenceClassification"]))),
    Bad("a model that brings code", MODEL, model(coded)),
    Bad(
        "a model without a tokenizer",
        MODEL,
        model(without("tokenizer*", "chat_template*", "special_tokens*")),
    ),
    Bad("a tokenizer of another family", ("teacher.path=./model",), swapped),
    Bad("a model that nothing stops", MODEL, model(silent, eos_token_id=None)),
    Bad("a model without weights", MODEL, model(without("*.safetensors"))),
    Bad("weights as a pickle", MODEL, model(pickled)),
    Bad(
        "weights that are no safetensors",
        MODEL,
        model(lambda f: (f / "model.safetensors").write_bytes(b"not a tensor")),
    ),
    Bad("weights that were copied in part", MODEL, model(cut)),
    Bad("an index that names a file that is missing", MODEL, model(sharded)),
    Bad(
        "an index that is no JSON",
        MODEL,
        model(lambda f: (f / "model.safetensors.index.json").write_text("{")),
    ),
    Bad("weights of which one is missing", ("teacher.path=./model",), model(thinned), loads=True),
    Bad("a model larger than the memory", (*MODEL, "teacher=self"), model(configured(**LARGE))),
]

# -- servers


@contextlib.contextmanager
def a_page(words: Callable[[str], list[str]]) -> Iterator[list[str]]:
    """A web server that answers everything with a page."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>It works!</html>")

        def log_message(self, *words: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield words(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def a_teacher(_: Path, token: str | None = None, **limits: Any) -> Iterator[list[str]]:
    """A server of ``serve_teacher``."""
    with serving(a_bench(**limits), token=token) as (address, _service):
        yield [f"teacher.address={address}"]


def nobody(name: str) -> Make:
    """An address where nothing listens."""
    return lambda folder: [f"{name}=http://127.0.0.1:{free_port()}"]


def with_engine_folder(folder: Path) -> None:
    (folder / "served").mkdir()
    (folder / "served" / "config.json").write_text("{}")


SERVED = ("teacher=served", "teacher.patience_s=0")
VLLM = ("teacher=vllm_server", "teacher.path=builtin:word_problems/teacher", "teacher.patience_s=0")
ENGINE = ("engine=vllm_server", "engine.retries=0", "engine.folder=served")
SERVERS = [
    Bad("a teacher's server that is down", SERVED, nobody("teacher.address")),
    Bad("a page in place of a teacher", SERVED, lambda f: a_page(lambda at: [f"teacher.address={at}"])),
    Bad(
        "a token that the server does not take", SERVED, partial(a_teacher, token="right-token", context=640)
    ),
    Bad("a server for shorter rows", SERVED, partial(a_teacher, context=639)),
    Bad("a server for fewer ids", SERVED, partial(a_teacher, context=640, most_ids=15)),
    Bad("an address that is none", ("teacher=served", "teacher.address=localhost:8765")),
    Bad("an address with a password", ("teacher=served", "teacher.address=http://me:letmein@host:8765")),
    Bad("a vLLM server that is down", VLLM, nobody("teacher.address")),
    Bad("a page in place of a vLLM server", VLLM, lambda f: a_page(lambda at: [f"teacher.address={at}"])),
    Bad(
        "an engine's server that is down",
        ENGINE,
        lambda f: [with_engine_folder(f) or f"engine.url=http://127.0.0.1:{free_port()}"],
    ),
    Bad(
        "a page in place of an engine",
        ENGINE,
        lambda f: a_page(lambda at: [f"engine.url={at}"]) if not with_engine_folder(f) else None,
    ),
    Bad("an engine's address that is none", ("engine=vllm_server", "engine.url=localhost")),
]

# -- disks


def full(folder: Path) -> list[str]:
    """A run's folder on whose device no byte is left."""
    (folder / "run").mkdir()
    (folder / "run" / ".config.yaml.part").symlink_to("/dev/full")  # it is written beside its place
    save_model(folder / "model")
    return ["student.path=./model", "teacher.path=./model", "debug=fast", "callbacks=[]"]


def a_file(folder: Path) -> None:
    (folder / "file").write_text("")


DISKS = [
    Bad("a run's folder below a file", ("hydra.run.dir=file/run",), a_file),
    Bad("a run's folder where none can be made", ("hydra.run.dir=/proc/run",), needs="/proc/self/mem"),
    Bad("a full disk", (), full, loads=True, needs="/dev/full"),
    Bad("a teacher's cache below a file", ("teacher.cache=file/cache",), a_file),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "bad_inputs.md"
INPUTS = {"Files": FILES, "Settings": SETTINGS, "Models": MODELS, "Servers": SERVERS, "Disks": DISKS}


def missing(need: str | None) -> str | None:
    """Return why this machine cannot have an input, None where it can."""
    if need is None:
        return None
    if need == "no gpu":
        return "there is a GPU" if torch.cuda.is_available() else None
    if need.startswith("/"):
        return None if Path(need).exists() else f"there is no {need}"
    return None if importlib.util.find_spec(need) else f"there is no {need}"


def said(bad: Bad, folder: Path) -> Finished:
    """Run ``train`` on an input in ``folder``, which becomes the working directory."""
    with pytest.MonkeyPatch.context() as patch, bad.made(folder) as words:
        patch.chdir(folder)
        if not bad.loads:
            patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", _closed)
        return here("train", *words, folder=Path("run"))


def _closed(*arguments: Any, **more: Any) -> None:
    raise AssertionError("a model is loaded")


def row(bad: Bad, sentence: str) -> str:
    """Return an input's row of the page."""
    words = " ".join(bad.words).replace("|", "\\|")
    star = " \\*" if bad.loads else ""
    return f"| {bad.what}{star} | `{words or '…'}` | {sentence.replace('|', chr(92) + '|')} |"


HEAD = """# Inputs that cannot work, and what is said

Each ends `python -m opd_lightning.train` with exit code 2 and one line on stderr, before a model is loaded except in
rows with \\*. `python -m opd_lightning.preflight` with the same words shows everything that it finds at once. The rows
are run by `tests/commands/test_bad_inputs.py`, which fails where this page says something else;
`HF_HUB_OFFLINE=1 PYTHONPATH=tests python -m commands.bad_inputs` in the repository writes it anew. `…` stands for what
differs between machines.
"""


def main() -> None:
    """Write the page."""
    text = [HEAD.rstrip()]
    for group, inputs in INPUTS.items():
        text += [f"\n## {group}\n", "| input | words | sentence |", "|---|---|---|"]
        for bad in inputs:
            if missing(bad.needs):
                raise SystemExit(f"{bad.what}: {missing(bad.needs)}")
            with tempfile.TemporaryDirectory() as folder:
                done = said(bad, Path(folder))
            text.append(row(bad, last_line(done)))
            print(text[-1], flush=True)
    PAGE.write_text("\n".join(text) + "\n")


def last_line(done: Finished) -> str:
    """Return what a command said at its end, without what differs between machines."""
    assert done.code == 2, done.out + done.err
    assert "Traceback" not in done.out + done.err
    (line,) = {line for line in done.err.splitlines() if line.startswith("error: ")}
    return stable(line.removeprefix("error: "))


if __name__ == "__main__":
    main()
