"""What cannot work is refused: one sentence with field, condition, value and remedy, exit code 2, no traceback."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from commands.own import SUMS, save_model, shipped_tokenizer, write_rows
from commands.running import end, here, start

FORM = re.compile(r"error: `(?P<field>[\w.]+)` must .+, got .+; .+")


def refusal(done, field: str, *parts: str) -> str:
    """Return the sentence of a refused command after checking its form."""
    found = FORM.fullmatch(done.sentence)
    assert found, done.sentence
    assert found["field"] == field
    for part in parts:
        assert part in done.sentence
    return done.sentence


# (arguments, field, what the sentence says beside it)
PARTS = [
    (["estimator=topk", "support=none"], "support", ["got none", "support=teacher"]),
    (["support.k=1"], "support", ["at least 2", "got 1:", "support.k=16", "estimator.form=tail"]),
    (["support=sampled"], "support", ["at least 2", "got 1:", "estimator=token"]),
    (
        ["estimator=token", "estimator.gradient=direct"],
        "estimator.gradient",
        ["got 'direct'", "expected gradient of exactly 0", "estimator=topk"],
    ),
    (["estimator=discounted", "estimator.gamma=1.5"], "estimator.gamma", ["in [0, 1]", "got 1.5"]),
    (["estimator=discounted", "estimator.gamma=-0.1"], "estimator.gamma", ["in [0, 1]", "got -0.1"]),
    (["support.k=0"], "support.k", ["got 0"]),
    (["support.k=100000"], "support.k", ["at most", "got 100000", "support=full"]),
    (["estimator.form=wrong"], "estimator.form", ["renormalised", "got 'wrong'"]),
    (["rollout.temperature=0"], "rollout.temperature", ["above 0", "got 0"]),
    (["rollout.top_p=2"], "rollout.top_p", ["in (0, 1]", "got 2"]),
    (["rollout.min_p=1"], "rollout.min_p", ["in [0, 1)", "got 1"]),
    (["rollout.max_new_tokens=abc"], "rollout.max_new_tokens", ["at least 1 token", "got 'abc'"]),
    (["rollout.loss_horizon=0"], "rollout.loss_horizon", ["at least 1 token", "got 0"]),
    (["rollout.samples=many"], "rollout.samples", ["whole number", "got 'many'"]),
]
SETTINGS = [
    (["trainer.max_steps=0"], "trainer.max_steps", ["at least 1", "got 0"]),
    (["trainer.max_steps=null"], "trainer.max_steps", ["got None"]),
    (["trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches", ["got 0"]),
    (["trainer.precision=bf16-true"], "trainer.precision", ["got 'bf16-true'", "student.dtype=bfloat16"]),
    (["trainer.accelerator=wrong"], "trainer.accelerator", ["one of auto, cpu", "'wrong'"]),
    (["evaluation.every_steps=0"], "evaluation.every_steps", ["got 0", "null"]),
    (["evaluation.settings.top_p=0"], "evaluation.settings.top_p", ["in (0, 1]", "got 0"]),
    (["evaluation.settings.max_new_tokens=0"], "evaluation.settings.max_new_tokens", ["at least 1", "got 0"]),
    (["task.train_size=0"], "task.train_size", ["at least 1", "got 0"]),
    (["evaluation.settings.batch=0"], "evaluation.settings.batch", ["got 0"]),
    (["evaluation.split=wrong"], "split", ["validation", "got 'wrong'"]),
    (
        ["collector.prompts_per_collection=5", "collector.steps_per_collection=4"],
        "collector.prompts_per_collection",
        ["multiple of collector.steps_per_collection=4", "got 5", "use 8"],
    ),
    (["collector.steps_per_collection=0"], "collector.steps_per_collection", ["got 0"]),
    (["collector.score_rows=some"], "collector.score_rows", ["got 'some'"]),
    (["collector.score_tokens=0"], "collector.score_tokens", ["got 0", "null"]),
    (["collector.micro_batch_tokens=600"], "collector.micro_batch_tokens", ["640 tokens", "got 600"]),
    (["collector.micro_batch_tokens=some"], "collector.micro_batch_tokens", ["got 'some'"]),
    (
        ["collector.micro_batch_tokens=2000", "trainer.accumulate_grad_batches=2"],
        "trainer.accumulate_grad_batches",
        ["collector.micro_batch_tokens=2000", "got 2", "leave one"],
    ),
    (["collector.max_prompt_tokens=0"], "collector.max_prompt_tokens", ["got 0"]),
    (["collector.prompt_pool=0"], "collector.prompt_pool", ["at least 1", "got 0", "null"]),
    (["collector.prompt_pool=some"], "collector.prompt_pool", ["whole number", "got 'some'"]),
    (["collector.long_prompts=cut"], "collector.long_prompts", ["drop or refuse", "got 'cut'"]),
    (["optimizer.lr=-1"], "optimizer", ["AdamW", "-1"]),
    (["scheduler.final=2"], "scheduler.final", ["in [0, 1]", "got 2"]),
    (["student.dtype=int8"], "student.dtype", ["got 'int8'", "bfloat16"]),
    (["student.compile=layers"], "student.compile", ["true or false", "got 'layers'"]),
    (["student.layout=dense"], "student.layout", ["auto, padded, buckets, packed", "got 'dense'"]),
    (["teacher.dtype=wrong"], "teacher.dtype", ["got 'wrong'", "bfloat16"]),
    (["reporting.peak_tflops=0"], "reporting.peak_tflops", ["above 0", "got 0", "null"]),
    (["reporting.peak_tflops=some"], "reporting.peak_tflops", ["got 'some'"]),
    (["seed=-1"], "seed", ["got -1"]),
    (["seed=word"], "seed", ["got 'word'"]),
]
COMMAND_LINE = [
    (["nonsense=1"], "nonsense", ["key of the configuration", "unknown"]),
    (["+nonsense=1"], "nonsense", ["key of the configuration", "unknown"]),
    (["max_steps=7"], "max_steps", ["unknown", "trainer.max_steps"]),
    (["estimator.nonsense=1"], "estimator.nonsense", ["unknown"]),
    (["+estimator.nonsense=1"], "estimator", ["TopK", "nonsense"]),
    (["+student.nonsense=1"], "student.nonsense", ["unknown", "path"]),
    (["+collector.nonsense=1"], "collector.nonsense", ["unknown", "score_rows"]),
    (["+evaluation.nonsense=1"], "evaluation.nonsense", ["unknown", "every_steps"]),
    (["estimator.gamma=0.5"], "estimator.gamma", ["not chosen", "estimator=discounted"]),
    (["estimator=token", "divergence=jsd"], "divergence", ["not chosen", "estimator=topk"]),
    (["mask.special_tokens.tokens=[a]"], "mask.special_tokens.tokens", ["add mask=[special_tokens]"]),
    (["support=wrong"], "support", ["one of augmented, full, none", "got 'wrong'"]),
    (["support=null"], "support", ["one of augmented, full, none", "got null"]),
    (["experiment=wrong"], "experiment", ["local_support_matching", "got 'wrong'"]),
    (["mask=[wrong]"], "mask", ["special_tokens", "got 'wrong'"]),
    (["+experiment=esr"], "experiment", ["without a plus", "experiment=…"]),
    (["task=jsonl"], "task.path", ["be given", "add task.path="]),
]
EVALUATION = [
    (["samples=4"], "samples", ["be 1 for greedy", "got 4", "temperature=1.0"]),
    (["samples=0"], "samples", ["at least 1", "got 0"]),
    (["temperature=-1"], "temperature", ["got -1"]),
    (["top_p=2"], "top_p", ["got 2"]),
    (["max_new_tokens=0"], "max_new_tokens", ["got 0"]),
    (["max_prompt_tokens=0"], "max_prompt_tokens", ["got 0"]),
    (["accelerator=wrong"], "accelerator", ["got 'wrong'", "cpu"]),
    (["trainer.max_steps=3"], "trainer.max_steps", ["unknown"]),
    (["+nonsense=1"], "nonsense", ["unknown"]),
    (["student.path=/nowhere"], "student.path", ["got '/nowhere'", "check the path"]),
]


def ids(case):
    return " ".join(case[0])


@pytest.mark.usefixtures("models_stay_closed")
class TestBeforeAModelIsLoaded:
    @pytest.mark.parametrize("case", PARTS + SETTINGS + COMMAND_LINE, ids=ids)
    def test_of_training(self, case, tmp_path):
        arguments, field, says = case
        refusal(here("train", *arguments, folder=tmp_path / "run"), field, *says)

    @pytest.mark.parametrize("case", EVALUATION, ids=ids)
    def test_of_evaluation(self, case, tmp_path):
        arguments, field, says = case
        refusal(here("evaluate", *arguments, folder=tmp_path / "run"), field, *says)

    @pytest.mark.parametrize("word", ["seed", "mask=[special_tokens", "student.path=~/model"])
    def test_of_an_override_that_does_not_parse(self, word, tmp_path):
        sentence = here("train", word, folder=tmp_path / "run").sentence
        assert sentence.startswith(f"error: an override must read key=value, got {word!r}; ")

    def test_of_several_values_without_a_multirun(self, tmp_path):
        sentence = here("train", "seed=0,1", folder=tmp_path / "run").sentence
        assert "'seed=0,1'" in sentence
        assert "-m" in sentence

    def test_of_a_process_launcher_in_a_multirun(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        done = here("train", "-m", "seed=0", "trainer.devices=2", folder=tmp_path / "run")
        assert done.code == 2
        assert "`trainer.devices` must be 1 in a multirun, got 2" in done.err
        assert "Traceback" not in done.out + done.err

    @pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS", "LOCAL_RANK"])
    def test_of_a_multirun_in_one_process_of_several(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(name, "2")
        done = here("train", "-m", "seed=0", folder=tmp_path / "run")
        assert done.code == 2
        assert "`hydra.mode` must be RUN in a process of torchrun or srun, got MULTIRUN" in done.err
        assert "Traceback" not in done.out + done.err

    def test_of_slurm_without_slurm(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SLURM_NTASKS", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # without one, that is what is said
        done = here("train", "trainer=slurm", "debug=fast", folder=tmp_path / "run")
        refusal(done, "trainer", "outside of a SLURM job", "got slurm", "srun")

    # -- models

    @pytest.mark.parametrize("field", ["student.path", "teacher.path"])
    def test_of_a_folder_without_a_model(self, field, tmp_path):
        (tmp_path / "empty").mkdir()
        done = here("train", f"{field}={tmp_path / 'empty'}", folder=tmp_path / "run")
        refusal(done, field, "config.json", f"got '{tmp_path / 'empty'}'", "check the path")

    def test_of_a_name_that_no_hub_answers_to(self, tmp_path):
        done = here("train", "student.path=no/such-model", folder=tmp_path / "run")
        refusal(done, "student.path", "got 'no/such-model'", "config.json")

    def test_of_a_config_that_is_not_json(self, tmp_path):
        model = save_model(tmp_path / "model")
        (model / "config.json").write_text("{")
        done = here("train", f"student.path={model}", folder=tmp_path / "run")
        refusal(done, "student.path", f"got '{model}'")

    def test_of_another_tokenizer(self, tmp_path):
        """Two ids of ordinary tokens change places."""
        folder = tmp_path / "tokenizer"
        shipped_tokenizer().save_pretrained(folder)
        state = json.loads((folder / "tokenizer.json").read_text())
        vocab = state["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (folder / "tokenizer.json").write_text(json.dumps(state))
        model = save_model(tmp_path / "model", tokenizer=AutoTokenizer.from_pretrained(folder))
        done = here("train", f"teacher.path={model}", folder=tmp_path / "run")
        refusal(done, "teacher.path", "the student's tokenizer", "2 ordinary tokens", "'a'", "same family")

    # -- files

    @pytest.mark.parametrize("field", ["task.path", "task.val_path"])
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, ["be a file", "check the path"]),
            ("", ["at least one problem", "empty"]),
            ("\n\n", ["at least one problem", "empty"]),
            ('{"prompt": "a"}\n\n{"prompt": \n', ["one JSON object a line", ":3 (", "remove that line"]),
            ('{"prompt": "a"}\n{"question": "b"}\n', ["`prompt` or `messages`", ":2; write"]),
        ],
        ids=["missing", "empty", "blank", "broken line", "no prompt"],
    )
    def test_of_a_prompt_file(self, field, content, says, sums, tmp_path):
        file = tmp_path / "prompts.jsonl"
        if content is not None:
            file.write_text(content)
        files = {"task.path": sums, "task.val_path": sums} | {field: file}
        arguments = [f"{name}={path}" for name, path in files.items()]
        done = here("train", "task=jsonl", *arguments, folder=tmp_path / "run")
        refusal(done, field, str(file), *says)

    @pytest.mark.parametrize("command", ["train", "evaluate"])
    @pytest.mark.parametrize("choice", ["drop", "refuse"])
    def test_of_prompts_all_too_long(self, command, choice, sums, tmp_path):
        group = "collector." if command == "train" else ""
        limits = [f"{group}max_prompt_tokens=5", f"{group}long_prompts={choice}"]
        files = ["task=jsonl", f"task.path={sums}", f"task.val_path={sums}"]
        done = here(command, *files, *limits, folder=tmp_path / "run")
        sentence = refusal(done, f"{group}max_prompt_tokens", "6 of 6 prompts", "got 5", "raise")
        longest = re.search(r"the longest has (\d+)", sentence)[1]
        assert f"raise {group}max_prompt_tokens to {longest}" in sentence
        assert "long_prompts=drop" not in sentence  # would not help: none is left

    def test_of_messages_that_the_chat_template_does_not_take(self, tmp_path):
        """As Gemma's without a system's turn."""
        tokenizer = shipped_tokenizer()
        tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
        model = save_model(tmp_path / "model", tokenizer=tokenizer)
        file = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "system", "content": "a"}]}])
        models = [f"student.path={model}", f"teacher.path={model}"]
        done = here("train", "task=jsonl", f"task.path={file}", *models, folder=tmp_path / "run")
        refusal(done, "messages", "'role': 'system'", "System role not supported", "chat template")

    def test_of_one_long_prompt_by_choice(self, tmp_path):
        file = write_rows(tmp_path / "rows.jsonl", [*SUMS, {"prompt": "one more " * 50}])
        limits = ["collector.max_prompt_tokens=60", "collector.long_prompts=refuse"]
        done = here("train", "task=jsonl", f"task.path={file}", *limits, folder=tmp_path / "run")
        refusal(done, "collector.max_prompt_tokens", "1 of 7 prompts", "got 60", "long_prompts=drop")

    def test_of_an_evaluation_without_problems(self, sums, tmp_path):
        done = here("evaluate", "task=jsonl", f"task.path={sums}", folder=tmp_path / "run")
        refusal(done, "split", "got 'validation'", "split=train")


def test_of_weights_that_are_broken(tmp_path):
    model = save_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"not a tensor")
    done = here("train", f"student.path={model}", folder=tmp_path / "run")
    refusal(done, "student.path", f"got '{model}'", "safetensors")


def test_of_weights_that_are_missing(tmp_path):
    """transformers would draw them at random and warn."""
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = here("train", f"teacher.path={model}", folder=tmp_path / "run")
    assert "Traceback" not in done.out + done.err
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "`teacher.path` must hold every weight of a Qwen3ForCausalLM" in sentence
    assert "model.layers.1.mlp.up_proj.weight" in sentence


def test_a_refused_job_does_not_keep_the_others_from_running(tmp_path, monkeypatch):
    """Of three jobs the middle one is refused: its sentence, exit code 2, and two finished runs."""
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model")
    models = [
        f"student.path={model}",
        f"teacher.path={model}",
        "hydra.sweep.dir=jobs",
        "hydra.sweep.subdir=${hydra:job.num}",
    ]
    done = here("train", "-m", "support=teacher,none,student", *models, "debug=fast", folder=tmp_path / "run")
    assert done.code == 2
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == [
        next(line for line in done.err.splitlines() if "`support` must select" in line)
    ]
    assert "Traceback" not in done.out + done.err
    assert {path.parent.name for path in tmp_path.glob("jobs/*/summary.json")} == {"0", "2"}


def test_another_error_keeps_its_traceback(tmp_path, monkeypatch):
    """Only what is explained is shortened: a defect must stay findable."""

    def broken(*arguments, **more):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", broken)
    with pytest.raises(ZeroDivisionError):
        here("train", folder=tmp_path / "run")


def in_processes(tmp_path, *commands):
    """Run commands at once, each in a process and a folder of its own."""
    for number in range(len(commands)):
        (tmp_path / str(number)).mkdir()
    started = [start("train", *words, cwd=tmp_path / str(i)) for i, words in enumerate(commands)]
    return [end(process, tmp_path) for process in started]


def test_from_a_shell(tmp_path):
    mixed, unknown = in_processes(tmp_path, ["estimator=topk", "support=none"], ["nonsense=1"])
    refusal(mixed, "support", "support=teacher")
    refusal(unknown, "nonsense", "unknown")
    assert mixed.out == unknown.out == ""


@pytest.mark.slow
def test_from_a_shell_with_files(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n')
    line, missing = in_processes(
        tmp_path,
        ["task=jsonl", f"task.path={broken}"],
        ["task=jsonl", "task.path=nowhere.jsonl"],
    )
    refusal(line, "task.path", f"{broken}:2")
    refusal(missing, "task.path", "got 'nowhere.jsonl'")
