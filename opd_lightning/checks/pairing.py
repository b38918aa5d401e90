"""Student and teacher beside each other: token ids, widths, what ends a response, chat templates."""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from opd_lightning.checks.facts import ModelFacts
from opd_lightning.checks.finding import Finding, ok, refuse, warning
from opd_lightning.loading import SharesVocabulary, TeacherSource
from opd_lightning.models import shared_vocabulary

_CHATS = (
    [{"role": "user", "content": "What is 2+3?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}],
)
_ANSWER = "opdanswer"


def tokens(student: ModelFacts, teacher_model: ModelFacts) -> Iterator[Finding]:
    """Refuse tokenizers whose ids mean other tokens; say up to which width both are read."""
    widths = student.width, teacher_model.width
    shared = shared_vocabulary(student.tokenizer, teacher_model.tokenizer, widths)
    padded = (
        "" if widths[0] == widths[1] else f" (logits of {widths[0]} and {widths[1]} are read up to there)"
    )
    yield ok("teacher.path", f"has the student's tokenizer, {shared} ids{padded}")


def served_tokens(student: ModelFacts, teacher: TeacherSource) -> Iterator[Finding]:
    """Refuse a teacher elsewhere whose ids mean other tokens."""
    if isinstance(teacher, SharesVocabulary):
        shared = teacher.shared_vocabulary(student.tokenizer, student.width)
        yield ok("teacher", f"has the student's tokenizer, {shared} ids")


def stops(student: ModelFacts) -> Iterator[Finding]:
    """Refuse a student that no token stops; warn where the end of a turn does not."""
    if not student.stops:
        refuse(
            "student.path",
            "name a model with a stop token",
            f"none in generation_config.json and tokenizer of {student.path!r}",
            "add eos_token_id to its generation_config.json",
        )
    end = turn_end(student.tokenizer)
    if end is not None and end not in student.stops:
        token = student.tokenizer.convert_ids_to_tokens(end)
        yield warning(
            "student.path",
            f"stop where its chat template ends a turn, at {token!r} (id {end})",
            f"the stop ids {list(student.stops)}",
            f"add {end} to eos_token_id in its generation_config.json, or responses run on to the length limit",
        )
    else:
        names = student.tokenizer.convert_ids_to_tokens(list(student.stops))
        yield ok("student.path", f"stops at {', '.join(map(str, names))}")


def teacher_stops(student: ModelFacts, teacher_model: ModelFacts) -> Iterator[Finding]:
    """Warn where the teacher ends a response with a token that does not stop the student."""
    others = [i for i in teacher_model.stops if i not in student.stops]
    if others:
        names = ", ".join(map(str, student.tokenizer.convert_ids_to_tokens(others)))
        yield warning(
            "teacher.path",
            f"end responses where the student does, at ids {list(student.stops)}",
            f"{list(teacher_model.stops)} ({names} beside)",
            f"add {others} to eos_token_id in the student's generation_config.json: it learns to write them",
        )
    else:
        yield ok("teacher.path", "ends responses where the student does")


def templates(student: ModelFacts, teacher_model: ModelFacts) -> Iterator[Finding]:
    """Warn where the teacher's chat template makes other prompts: it is shown the student's."""
    own, other = (_rendered(model.tokenizer) for model in (student, teacher_model))
    if own == other:
        yield ok("teacher.path", "has prompts of the student's form")
        return
    which = next(i for i, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1])
    yield warning(
        "teacher.path",
        f"have the student's chat template, whose prompt is {_short(own[which])}",
        _short(other[which]),
        "copy the chat template of the one that was trained with it into the student's folder, since the teacher "
        "scores the student's prompts as they are",
    )


def _short(text: str | None) -> str:
    return "none" if text is None else repr(text if len(text) <= 120 else text[:117] + "...")


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Return each probe as a prompt, None where the template does not take it; plain text without a template."""
    if tokenizer.chat_template is None:
        return [None] * len(_CHATS)
    prompts: list[str | None] = []
    for chat in _CHATS:
        try:
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompts.append(str(prompt))
        except TemplateError:
            prompts.append(None)
    return prompts


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts behind an assistant's answer, None for none."""
    if tokenizer.chat_template is None:
        return None
    try:
        chat = [*_CHATS[0], {"role": "assistant", "content": _ANSWER}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except TemplateError:
        return None
    behind = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.added_tokens_decoder)
    return next((i for i in behind if i in special), None)
