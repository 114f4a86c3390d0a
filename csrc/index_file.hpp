// Megatron's .idx file: the checks that make it safe to follow its pointers. Knows bytes, not Python.
#pragma once
#include <cstddef>
#include <cstdint>

namespace demix {

enum class IndexProblem : int {
    none = 0,
    too_short,         // seen: bytes, expected: at least
    bad_magic,         //
    bad_version,       // seen: version, expected: 1
    bad_dtype,         // seen: code
    bad_size,          // seen: bytes of the file, expected: bytes the header asks for
    negative_length,   // at: sequence, seen: its length
    bad_pointer,       // at: sequence, seen: its byte pointer, expected: largest that fits the .bin
    bad_first_document,// seen: first document index, expected: 0
    bad_document,      // at: document, seen: its index, expected: at least the one before
    bad_last_document, // seen: last document index, expected: number of sequences
};

struct IndexCheck {
    IndexProblem problem = IndexProblem::none;
    std::int64_t at = 0, seen = 0, expected = 0;
    int dtype_code = 0;
    std::int64_t sequences = 0, boundaries = 0;  // boundaries: documents + 1
    std::int64_t tokens = 0;
    bool end_to_end = false;  // every sequence begins where the one before ends, from byte 0 to the end of the .bin
};

constexpr std::size_t kIndexHeaderBytes = 34;

// Walks the whole index once. `data`: the file's bytes; `bin_bytes`: size of the .bin its pointers lead into.
// Never reads past data + size, whatever the bytes say.
IndexCheck check_index(const std::uint8_t* data, std::size_t size, std::uint64_t bin_bytes);

}  // namespace demix
