// The quick path through JSON Lines: the string under one key of each line's object, unescaped, end to end.
#pragma once
#include <cstddef>
#include <cstdint>

namespace demix {

struct JsonLines {
    std::int64_t documents = 0;  // lines that are not blank
    std::int64_t bytes = 0;      // of their texts
    bool plain = true;           // false: a line needs the slow path; the outputs are then worthless
};

// `content` holds at least `size` bytes, `offsets` one entry more than there are lines, `lines` one for each (counted from 0).
// Accepts what Python's json module accepts, less a few rarities (escaped or repeated keys, NaN, nesting beyond 64 levels), and
// only lines that are UTF-8 throughout, with a string under `key`. Anything else makes the result not plain.
JsonLines scan_json_lines(const char* data, std::size_t size, const char* key, std::size_t key_size, std::uint8_t* content,
                          std::int64_t* offsets, std::int64_t* lines);

std::int64_t count_newlines(const char* data, std::size_t size);

}  // namespace demix
