"""Every public format becomes questions, from each form in which it ships; what is not in the format is named to the line."""

import json

import pytest
from task_files import ARC, ARC_ARCHIVE, GSM8K, HELLASWAG, MATH, MBPP, PIQA, SIQA, write_all, write_lines, write_parquet

from megatron_demix.errors import ConfigError, CorruptInput
from megatron_demix.evaluate.tasks.formats import FORMATS
from megatron_demix.evaluate.tasks.records import with_labels
from megatron_demix.evaluate.tasks.task import final_split, read_task, search_split, share_items
from megatron_demix.study.search import TASK_SCORES, TaskSpec


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("tasks"))


def read(path, format, split=None, **settings):
    spec = TaskSpec(name="t", format=format, path=path, split=split, **settings)
    return read_task(spec)


def test_every_format_of_a_study_is_there():
    assert set(FORMATS) == set(TASK_SCORES) == set(TaskSpec.model_fields["format"].annotation.__args__)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_from_its_folder(folders, name):
    task = read(folders[name], name)
    assert task.items
    for item in task.items:
        assert 0 <= item.gold < len(item.options) == len(item.answers)
        assert all(continuation for _, continuation in item.options)


def test_prompts(folders):
    assert read(folders["arc"], "arc").items[1].options == (
        ("Question: What falls?\nAnswer:", " a stone"),
        ("Question: What falls?\nAnswer:", " smoke"),
        ("Question: What falls?\nAnswer:", " fog"),
    )
    first, second = read(folders["hellaswag"], "hellaswag").items
    assert first.options[0] == ("Baking: A baker kneads dough. He", "  shapes a loaf.")
    assert first.answers[2] == "sings. Then stops."
    assert (second.gold, second.options[1][0]) == (1, "Rowing: A boat lies still. A woman")
    assert [item.gold for item in read(folders["piqa"], "piqa").items] == [0, 1]
    assert read(folders["siqa"], "siqa").items[0].shot == "Q: Ada lent Ben a pen. What will Ben do?\nA: write"
    mia = read(folders["winogrande"], "winogrande").items[1]
    assert (mia.options, mia.gold) == (
        (("Lea thanked Mia because Lea", " had helped."), ("Lea thanked Mia because Mia", " had helped.")),
        1,
    )
    assert read(folders["mbpp"], "mbpp").items[0].options[0][0].endswith("assert neg(4) == -4\n[BEGIN]\n")


def test_splits(folders):
    arc, gsm8k = (TaskSpec(name="t", format=f, path=folders[f]) for f in ("arc", "gsm8k"))
    assert (search_split(arc), final_split(arc)) == ("validation", "test")
    assert (search_split(gsm8k), final_split(gsm8k)) == ("test", "test")
    given = TaskSpec(name="t", format="arc", path=folders["arc"], split="test", final_split="validation")
    assert (search_split(given), final_split(given)) == ("test", "validation")
    assert len(read(folders["arc"], "arc", split="test").items) == 2
    assert [len(read(folders["mbpp"], "mbpp", split=s).items) for s in ("validation", "test")] == [1, 1]


def test_splits_that_are_the_same_items(folders, tmp_path):
    def shared(path, form="arc"):
        spec = TaskSpec(name="t", format=form, path=path)
        return share_items(*(spec.model_copy(update={"split": split_of(spec)}) for split_of in (search_split, final_split)))

    assert not shared(folders["arc"])
    assert not shared(folders["mbpp"], "mbpp"), "one file, whose records say their split"
    assert shared(folders["gsm8k"], "gsm8k"), "one split"
    (tmp_path / "one").mkdir()
    assert shared(write_lines(tmp_path / "one" / "arc.jsonl", ARC)), "one file for both"
    for split in ("validation", "test"):
        write_lines(tmp_path / "copies" / f"{split}.jsonl", ARC)
    assert shared(tmp_path / "copies"), "the same bytes"
    write_lines(tmp_path / "part" / "validation-0.jsonl", ARC[:1])
    for name in ("validation-1", "test"):
        write_lines(tmp_path / "part" / f"{name}.jsonl", ARC[1:])
    assert shared(tmp_path / "part"), "one file of several"
    assert not shared(tmp_path / "gone"), "the splits' names are all there is"


def test_forms_agree(tmp_path):
    flat = write_lines(tmp_path / "flat.jsonl", ARC[:1])
    archive = write_lines(tmp_path / "archive.jsonl", ARC_ARCHIVE)
    parquet = write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ARC[:1])
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(ARC[:1]))
    items = read(flat, "arc").items
    for other in (archive, parquet, parquet.parent, listed):
        assert read(other, "arc").items == items
    inside = write_lines(tmp_path / "piqa.jsonl", [{**PIQA[0], "label": 0}])
    beside = write_lines(tmp_path / "own" / "valid.jsonl", PIQA[:1])
    (beside.parent / "valid-labels.lst").write_text("0\n")
    assert read(inside, "piqa").items == read(beside, "piqa").items
    sanitized = {key: MBPP[2][key] for key in ("task_id", "code", "test_list")}
    sanitized |= {"prompt": MBPP[2]["text"], "test_imports": []}
    full, clean = write_lines(tmp_path / "mbpp.jsonl", MBPP), write_lines(tmp_path / "sanitized.jsonl", [sanitized])
    assert read(full, "mbpp").items[0].options == read(clean, "mbpp").items[0].options


def test_siqa_as_its_authors_ship_it(tmp_path):
    for split, letter in (("trn", "A"), ("dev", "C"), ("tst", "B")):
        write_lines(tmp_path / f"socialIQa_v1.4_{split}.jsonl", [SIQA[0] | {"correct": letter, "promptDim": "xWant"}])
    assert [read(tmp_path, "siqa", split=s).items[0].gold for s in ("train", "validation", "test")] == [0, 2, 1]


def test_worked_examples(folders, tmp_path):
    task = read(folders["arc"], "arc", num_shots=2)
    assert task.header == "Question: What is cold?\nAnswer: ice\n\nQuestion: What sees?\nAnswer: an eye\n\n"
    assert len(task.items) == len(ARC)
    one_file = read(write_lines(tmp_path / "arc.jsonl", ARC), "arc", num_shots=1)
    assert one_file.header == "Question: Which one is wet?\nAnswer: rain\n\n"
    assert len(one_file.items) == len(ARC) - 1, "an example is not a question"
    assert read(folders["mbpp"], "mbpp", num_shots=1).header.endswith("def inc(x):\n    return x + 1\n[DONE]\n\n")
    with pytest.raises(CorruptInput, match=r"task 't': 4 worked examples in .*Train\.jsonl, num_shots is 9"):
        read(folders["arc"], "arc", num_shots=9)
    with pytest.raises(
        ConfigError, match=r"no file under .* is named after the split 'train' \(train, trn\); found hellaswag_val"
    ):
        read(folders["hellaswag"], "hellaswag", num_shots=1)
    with pytest.raises(ValueError, match="format humaneval has no worked examples"):
        TaskSpec(name="t", format="humaneval", path=folders["humaneval"], num_shots=1)


def test_a_limit_is_spread_over_the_split(tmp_path):
    file = write_lines(tmp_path / "gsm8k.jsonl", [{**GSM8K[0], "question": f"{i}?"} for i in range(10)])
    assert [i.options[0][0] for i in read(file, "gsm8k", limit=3).items] == [f"Question: {n}?\nAnswer:" for n in (0, 3, 6)]


def test_what_is_not_in_the_format_is_named(tmp_path):
    good = HELLASWAG[1]
    for record, message in (
        ({"goal": "x"}, r"tasks\.jsonl line 2: not in the format hellaswag: there is no 'endings'. Its keys are 'goal'; "
                        "expected are 'activity_label', 'ctx_a', 'ctx_b', 'endings', 'label'"),
        ({**good, "endings": "one"}, "line 2: .*'endings' is 'one', expected a list of texts"),
        ({**good, "label": 7}, "line 2: .*'label' is 7, expected one of 0, 1, 2, 3"),
        ({**good, "label": ""}, "line 2: 'label' is '': this split is published without answers"),
        ({**good, "ctx_b": None}, "line 2: .*'ctx_b' is None, expected text"),
        ([1], "line 2: .*a record is a mapping with activity_label, .*found list"),
    ):  # fmt: skip
        with pytest.raises(CorruptInput, match=message):
            read(write_lines(tmp_path / "tasks.jsonl", [good, record]), "hellaswag")
    (tmp_path / "broken.jsonl").write_text('{"goal": "x"}\n{"goal"')
    with pytest.raises(CorruptInput, match=r"broken\.jsonl line 1: .*there is no 'sol1'"):
        read(tmp_path / "broken.jsonl", "piqa")
    (tmp_path / "broken.jsonl").write_text('{"goal"')
    with pytest.raises(CorruptInput, match=r"broken\.jsonl line 1: not JSON"):
        read(tmp_path / "broken.jsonl", "piqa")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(CorruptInput, match=r"x\.parquet: not a Parquet file"):
        read(tmp_path / "x.parquet", "piqa")
    (tmp_path / "x.jsonl.gz").write_text("no")
    with pytest.raises(CorruptInput, match=r"x\.jsonl\.gz: cannot be read as text"):
        read(tmp_path / "x.jsonl.gz", "piqa")
    with pytest.raises(ConfigError, match=r"task 't': .*nowhere does not exist; expected a file or a folder of \.jsonl"):
        read(tmp_path / "nowhere", "piqa")
    write_lines(tmp_path / "labelled" / "dev.jsonl", PIQA)
    (tmp_path / "labelled" / "dev-labels.lst").write_text("1\n")
    with pytest.raises(CorruptInput, match=r"line 2: .*dev-labels\.lst has only 1 labels"):
        read(tmp_path / "labelled", "piqa")
    write_lines(tmp_path / "own.jsonl", [{**MBPP[0], "task_id": 2000}])
    with pytest.raises(CorruptInput, match="'task_id' is 2000, expected a number from 1 to 974"):
        read(tmp_path / "own.jsonl", "mbpp")
    write_lines(tmp_path / "own.jsonl", [{"question": "x", "answer": "42"}])
    with pytest.raises(CorruptInput, match="'answer' is '42', expected a solution that ends with #### and a number"):
        read(tmp_path / "own.jsonl", "gsm8k")


def test_variants_of_a_data_set_are_not_mixed(tmp_path):
    for variant in ("main", "socratic"):
        write_lines(tmp_path / variant / "test.jsonl", GSM8K)
    with pytest.raises(ConfigError, match=r"several files could be the split 'test': main/test\.jsonl, socratic/test"):
        read(tmp_path, "gsm8k")
    for part in range(2):
        write_parquet(tmp_path / "parts" / f"test-0000{part}-of-00002.parquet", GSM8K)
    assert len(read(tmp_path / "parts", "gsm8k").items) == 2 * len(GSM8K)


def test_a_folder_that_is_named_after_two_splits_mixes_none(tmp_path):
    for split in ("train", "test"):
        write_lines(tmp_path / "math-train-test" / f"{split}.jsonl", [{**MATH[0], "problem": split}] * 2)
    task = read_task(TaskSpec(name="m", format="math", path=tmp_path, num_shots=1))
    assert [item.options[0][0] for item in task.items] == ["Problem:\ntest\n\nSolution:"] * 2
    assert task.header.startswith("Problem:\ntrain\n")


def test_labels_beside_a_file_belong_to_what_is_read(tmp_path):
    """A stage's key holds the digests of these files."""
    file = write_lines(tmp_path / "valid.jsonl", PIQA)
    assert with_labels([file]) == [file]
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    assert with_labels([file]) == [file, tmp_path / "valid-labels.lst"]
