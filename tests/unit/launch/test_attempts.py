"""The account of attempts: what gets further may go on for ever, what does not is given up."""

import pytest

from megatron_demix.errors import StageFailed
from megatron_demix.launch.attempts import Attempts, forget
from megatron_demix.pipeline.stage import Stage


@pytest.fixture
def stage(tmp_path):
    return Stage("components/code", tmp_path, {}, (), lambda folder: None, ranks=1)


def test_three_attempts_without_anything_saved_are_the_last(stage):
    for _ in range(3):
        Attempts.read(stage).begin(stage)
    said = r"stage components/code: ended 3 times without saving anything new, and is not .* Look at .*code-\w+\*\.log;"
    with pytest.raises(StageFailed, match=said):
        Attempts.read(stage).begin(stage)
    forget(stage)
    Attempts.read(stage).begin(stage)


def test_a_new_checkpoint_or_a_scored_row_starts_the_count_again(stage):
    for number in range(5):
        (stage.work / f"iter_{number:07d}").mkdir(parents=True)
        Attempts.read(stage).begin(stage)
        (stage.work / "losses.jsonl").write_text("{}\n" * number)
        Attempts.read(stage).begin(stage)
        assert Attempts.read(stage).number == 2
        (stage.work / "rows-0.jsonl").write_text("{}\n" * (number + 1))
        Attempts.read(stage).begin(stage)
        assert Attempts.read(stage).number == 1


def test_a_damaged_account_is_begun_again(stage):
    Attempts.read(stage).begin(stage)
    stage.log.with_suffix(".attempts.json").write_text('{"saved": 1, "oth')
    assert Attempts.read(stage) == Attempts()
