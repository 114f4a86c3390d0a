"""Exit codes are a contract with scripts; the disk's errors become one class."""

import errno

import pytest

from megatron_demix import errors

CODES = {
    "DemixError": 1,
    "ConfigError": 2,
    "IncompatibleInputs": 3,
    "MixtureError": 4,
    "VerificationFailed": 5,
    "OutputExists": 6,
    "CorruptInput": 7,
    "UnsafeInput": 7,
    "StageFailed": 8,
    "Diverged": 9,
    "RerunAsked": 16,
    "FaultFound": 17,
    "StorageError": 74,
    "Incomplete": 75,
    "EndedEarly": 75,
}


def test_exit_codes_stay_what_they_are():
    found = {n: c.exit_code for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.DemixError)}
    assert found == CODES


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_is_a_storage_error(number):
    message = r"writing the blend: .*\(/data/x\.bin\)\. Free space"
    with pytest.raises(errors.StorageError, match=message) as caught, errors.storage_errors("writing the blend"):
        raise OSError(number, "refused", "/data/x.bin")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_refusal_that_names_no_file_is_told_by_what_was_written():
    message = r"^writing /data/x\.bin: No space left on device\. Free space"
    with pytest.raises(errors.StorageError, match=message), errors.storage_errors("writing /data/x.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_read_meanwhile_is_no_place_to_write(tmp_path):
    (tmp_path / "out").mkdir()
    for where, kind in ((tmp_path / "out" / "x", errors.StorageError), (tmp_path / "corpus.jsonl", PermissionError)):
        with pytest.raises(kind), errors.storage_errors("writing", under=tmp_path / "out"):
            raise PermissionError(errno.EACCES, "refused", str(where))


def test_other_errors_pass_unchanged():
    with pytest.raises(FileNotFoundError, match="nowhere"), errors.storage_errors("reading"):
        raise FileNotFoundError(errno.ENOENT, "nowhere")
    with pytest.raises(errors.MixtureError, match=r"^bad$"), errors.storage_errors("writing"):
        raise errors.MixtureError("bad")
