"""The public formats: what a record of each becomes. Prompts are worded as in lm-evaluation-harness."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_demix.errors import CorruptInput
from megatron_demix.evaluate.tasks.records import Record


@dataclass(frozen=True)
class Item:
    """A question. options: what is scored, as (context, continuation); a single one for open questions, where the context is
    the prompt. gold: the right option. answers: of each option the text whose length normalises its score.

    reference: for open questions, what an answer is judged by (see the format's kind).
    """

    options: tuple[tuple[str, str], ...]
    gold: int
    answers: tuple[str, ...]
    reference: Mapping[str, str] = field(default_factory=dict)

    @property
    def shot(self) -> str:
        """The question with its right answer, as a worked example."""
        return "".join(self.options[self.gold])


@dataclass(frozen=True)
class Format:
    """kind: "choice" among options, a "number", a "formula", or "code" that has to pass tests.

    splits: those published with answers; the search takes the first of validation and test, the final table the last. examples:
    where worked examples come from; None: the format has none. split_of: the split of a record, where one file holds all.
    by_subject: whether a split is many files by design. stops: texts that end an answer. keys: what a record has, for messages.
    """

    kind: Literal["choice", "number", "formula", "code"]
    keys: Sequence[str]
    splits: Sequence[str]
    item: Callable[[Record], Item]
    stops: Sequence[str] = ()
    examples: str | None = "train"
    split_of: Callable[[Record], str] | None = None
    by_subject: bool = False

    def items(self, records: Iterable[Record], split: str) -> list[Item]:
        return [self.item(r) for r in records if self.split_of is None or self.split_of(r) == split]


def _choice(context: str, answers: Sequence[str], gold: int) -> Item:
    return Item(tuple((context, f" {answer}") for answer in answers), gold, tuple(answers))


def _arc(record: Record) -> Item:
    """Both forms: a question with stem and choices (the AI2 archive), and the flat one (Hugging Face)."""
    if isinstance(record.get("question"), Mapping):
        question = record.inside("question", ("stem", "choices"))
        stem, entries = question.text("stem"), question.get("choices")
        if not isinstance(entries, Sequence) or not all(isinstance(e, Mapping) for e in entries):
            question.refuse("choices", "a list of {text, label}")
        parts = [Record(f"{question.place}, choices", record.format, ("text", "label"), e) for e in entries]
        texts, labels = [p.text("text") for p in parts], [p.text("label") for p in parts]
    else:
        choices = record.inside("choices", ("text", "label"))
        stem, texts, labels = record.text("question"), choices.texts("text"), choices.texts("label")
        if len(texts) != len(labels):
            choices.refuse("label", f"{len(texts)} labels, one for each text")
    return _choice(f"Question: {stem}\nAnswer:", texts, record.place_in("answerKey", labels))


def _hellaswag(record: Record) -> Item:
    endings = [_without_markup(e) for e in record.texts("endings")]
    scene = f"{record.text('activity_label')}: {record.text('ctx_a')} {record.text('ctx_b').capitalize()}"
    return _choice(_without_markup(scene), endings, record.place_in("label", [str(i) for i in range(len(endings))]))


def _without_markup(text: str) -> str:
    """WikiHow's marks, of which [title] begins a sentence."""
    return re.sub(r"\[[^\]\n]*\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(record: Record) -> Item:
    answers = [record.text("sol1"), record.text("sol2")]
    return _choice(f"Question: {record.text('goal')}\nAnswer:", answers, record.place_in("label", ["0", "1"]))


def _siqa(record: Record) -> Item:
    """Both forms: with a label (the leaderboard, Hugging Face), and with the right answer's letter (its authors' v1.4)."""
    answers = [record.text(f"answer{letter}") for letter in "ABC"]
    context = f"Q: {record.text('context')} {record.text('question')}\nA:"
    lettered = "correct" in record and "label" not in record
    gold = record.place_in("correct", list("ABC")) if lettered else record.place_in("label", ["1", "2", "3"])
    return _choice(context, answers, gold)


def _winogrande(record: Record) -> Item:
    """Each option stands in the blank, and what follows the blank is scored."""
    sentence = record.text("sentence")
    before, blank, after = sentence.partition("_")
    if not blank or not after.strip():
        record.refuse("sentence", "a sentence with a blank, _, and text behind it")
    options = tuple((before + record.text(key), f" {after.strip()}") for key in ("option1", "option2"))
    return Item(options, record.place_in("answer", ["1", "2"]), (after.strip(),) * 2)


def _gsm8k(record: Record) -> Item:
    answer = record.text("answer")
    if "####" not in answer:
        record.refuse("answer", "a solution that ends with #### and a number")
    options = ((f"Question: {record.text('question')}\nAnswer:", f" {answer}"),)
    return Item(options, 0, (answer,), {"answer": answer})


def _math(record: Record) -> Item:
    solution = record.text("solution")
    if "\\boxed" not in solution and "\\fbox" not in solution:
        record.refuse("solution", "a solution with its answer in \\boxed{}")
    return Item(((f"Problem:\n{record.text('problem')}\n\nSolution:", f" {solution}"),), 0, (solution,), {"answer": solution})


def _humaneval(record: Record) -> Item:
    prompt, solution = record.text("prompt"), record.text("canonical_solution")
    tests = f"{record.text('test')}\ncheck({record.text('entry_point')})\n"
    return Item(((prompt, solution),), 0, (solution,), {"before": prompt, "after": tests})


def _mbpp(record: Record) -> Item:
    """Both forms: the whole set (text) and the sanitised one (prompt)."""
    task = record.text("prompt" if "prompt" in record and "text" not in record else "text")
    tests, code = record.texts("test_list"), record.text("code")
    if "test_imports" in record:
        setup = "\n".join(record.texts("test_imports"))
    else:
        setup = record.text("test_setup_code") if "test_setup_code" in record else ""
    listed = "\n".join(tests[:3])
    prompt = (
        f"You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:\n\n"
        f"{listed}\n[BEGIN]\n"
    )
    reference = {"before": "", "after": f"{setup}\n" + "\n".join(tests) + "\n"}
    return Item(((prompt, f"{code}\n[DONE]"),), 0, (code,), reference)


_MBPP_SPLITS = (
    # Of the ten that its authors keep for prompts, theirs and the harness's begin with the second.
    ("examples", range(2, 11)),
    ("not used", range(1, 2)),
    ("test", range(11, 511)),
    ("validation", range(511, 601)),
    ("train", range(601, 975)),
)


def _mbpp_split(record: Record) -> str:
    """By task_id, as the data set's authors divide it."""
    number = record.get("task_id")
    for split, ids in _MBPP_SPLITS:
        if number in ids:
            return split
    raise CorruptInput(f"{record.place}: not in the format mbpp: 'task_id' is {number!r}, expected a number from 1 to 974.")


FORMATS: dict[str, Format] = {
    "arc": Format("choice", ("question", "choices", "answerKey"), ("train", "validation", "test"), _arc),
    "hellaswag": Format(
        "choice", ("activity_label", "ctx_a", "ctx_b", "endings", "label"), ("train", "validation"), _hellaswag
    ),
    "piqa": Format("choice", ("goal", "sol1", "sol2", "label"), ("train", "validation"), _piqa),
    "siqa": Format("choice", ("context", "question", "answerA", "answerB", "answerC", "label"), ("train", "validation"), _siqa),
    "winogrande": Format("choice", ("sentence", "option1", "option2", "answer"), ("train", "validation"), _winogrande),
    "gsm8k": Format("number", ("question", "answer"), ("train", "test"), _gsm8k, stops=("Question:",)),
    "math": Format("formula", ("problem", "solution"), ("train", "test"), _math, stops=("Problem:",), by_subject=True),
    "humaneval": Format(
        "code",
        ("prompt", "entry_point", "canonical_solution", "test"),
        ("test",),
        _humaneval,
        stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        examples=None,
    ),
    "mbpp": Format(
        "code",
        ("text or prompt", "code", "task_id", "test_list"),
        ("train", "validation", "test"),
        _mbpp,
        stops=("[DONE]",),
        examples="examples",
        split_of=_mbpp_split,
    ),
}
