// Token ids as tokenizers give them to tokens as a .bin holds them.
#pragma once
#include <cstdint>

namespace demix {

// Copies the documents whose route[i] == which (all of them where route is null) from ids[offsets[i], offsets[i+1]) end to end
// to `out`, as uint16 or int32 (item_bytes 2 or 4), each followed by `eod` unless that is negative. The ids fit.
void pack_tokens(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
                 std::uint8_t which, std::int64_t eod, int item_bytes, std::uint8_t* out);

}  // namespace demix
