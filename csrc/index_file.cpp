#include "index_file.hpp"

#include <cstring>

#include "unaligned.hpp"

namespace demix {
namespace {

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr int kItemBytes[9] = {0, 1, 1, 2, 4, 8, 8, 4, 2};  // by dtype code

IndexCheck fail(IndexCheck c, IndexProblem problem, std::int64_t at, std::int64_t seen, std::int64_t expected) {
    c.problem = problem;
    c.at = at;
    c.seen = seen;
    c.expected = expected;
    return c;
}

}  // namespace

IndexCheck check_index(const std::uint8_t* data, std::size_t size, std::uint64_t bin_bytes) {
    IndexCheck c;
    const auto file_bytes = static_cast<std::int64_t>(size);
    if (size < kIndexHeaderBytes) return fail(c, IndexProblem::too_short, 0, file_bytes, kIndexHeaderBytes);
    if (std::memcmp(data, kMagic, sizeof kMagic) != 0) return fail(c, IndexProblem::bad_magic, 0, 0, 0);
    const auto version = load<std::uint64_t>(data + 9);
    if (version != 1) return fail(c, IndexProblem::bad_version, 9, static_cast<std::int64_t>(version), 1);
    c.dtype_code = data[17];
    if (c.dtype_code < 1 || c.dtype_code > 8) return fail(c, IndexProblem::bad_dtype, 17, c.dtype_code, 0);
    const auto sequences = load<std::uint64_t>(data + 18), boundaries = load<std::uint64_t>(data + 26);
    const std::uint64_t body = size - kIndexHeaderBytes;
    // Bounds first: the products below cannot overflow once both counts fit the file.
    if (sequences > body / 12 || boundaries > body / 8 || boundaries == 0)
        return fail(c, IndexProblem::bad_size, 18, file_bytes, -1);
    const std::uint64_t plain = sequences * 12 + boundaries * 8;
    const bool modes = sequences != 0 && body == plain + sequences;
    if (body != plain && !modes)
        return fail(c, IndexProblem::bad_size, 18, file_bytes, static_cast<std::int64_t>(plain + kIndexHeaderBytes));
    c.sequences = static_cast<std::int64_t>(sequences);
    c.boundaries = static_cast<std::int64_t>(boundaries);

    const std::uint8_t* lengths = data + kIndexHeaderBytes;
    const std::uint8_t* pointers = lengths + sequences * 4;
    const std::uint8_t* documents = pointers + sequences * 8;
    const auto item = static_cast<std::uint64_t>(kItemBytes[c.dtype_code]);
    std::uint64_t end = 0;
    bool end_to_end = true;
    for (std::uint64_t i = 0; i < sequences; ++i) {
        const auto length = load<std::int32_t>(lengths + i * 4);
        if (length < 0) return fail(c, IndexProblem::negative_length, static_cast<std::int64_t>(i), length, 0);
        const auto pointer = load<std::int64_t>(pointers + i * 8);
        const std::uint64_t need = static_cast<std::uint64_t>(length) * item;
        if (pointer < 0 || need > bin_bytes || static_cast<std::uint64_t>(pointer) > bin_bytes - need)
            return fail(c, IndexProblem::bad_pointer, static_cast<std::int64_t>(i), pointer,
                        static_cast<std::int64_t>(need > bin_bytes ? 0 : bin_bytes - need));
        c.tokens += length;
        end_to_end &= static_cast<std::uint64_t>(pointer) == end;
        end = static_cast<std::uint64_t>(pointer) + need;
    }
    c.end_to_end = end_to_end && end == bin_bytes;
    std::int64_t before = load<std::int64_t>(documents);
    if (before != 0) return fail(c, IndexProblem::bad_first_document, 0, before, 0);
    for (std::uint64_t i = 1; i < boundaries; ++i) {
        const auto next = load<std::int64_t>(documents + i * 8);
        if (next < before) return fail(c, IndexProblem::bad_document, static_cast<std::int64_t>(i), next, before);
        before = next;
    }
    if (before != c.sequences)
        return fail(c, IndexProblem::bad_last_document, c.boundaries - 1, before, c.sequences);
    return c;
}

}  // namespace demix
