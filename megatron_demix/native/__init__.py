"""The compiled core, and what this machine can do.

Everything that crosses into C++ is checked here: dtype, contiguity, size, and that the memory outlives its use.
"""

from megatron_demix.native.checkpoints import (
    crc32,
    scan_pickle,
)
from megatron_demix.native.data import (
    HASH_BLOCK,
    DocumentStream,
    IndexCheck,
    Interleaver,
    StreamPart,
    check_index,
    count_newlines,
    gather,
    hash_documents,
    hash_file,
    pack_tokens,
    scan_json_lines,
)
from megatron_demix.native.files import (
    MappedFile,
    reserve,
)
from megatron_demix.native.machine import (
    default_threads,
    instruction_set,
    instruction_sets,
)
from megatron_demix.native.merging import (
    BUFFERS_PER_THREAD,
    DeltaRules,
    MergePlan,
)

__all__ = [
    "BUFFERS_PER_THREAD",
    "HASH_BLOCK",
    "DeltaRules",
    "DocumentStream",
    "IndexCheck",
    "Interleaver",
    "MappedFile",
    "MergePlan",
    "StreamPart",
    "check_index",
    "count_newlines",
    "crc32",
    "default_threads",
    "gather",
    "hash_documents",
    "hash_file",
    "instruction_set",
    "instruction_sets",
    "pack_tokens",
    "reserve",
    "scan_json_lines",
    "scan_pickle",
]
