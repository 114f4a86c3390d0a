#include "pack_tokens.hpp"

namespace demix {
namespace {

template <class T>
void pack(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
          std::uint8_t which, std::int64_t eod, T* out) {
    for (std::int64_t i = 0; i < documents; ++i) {
        if (route && route[i] != which) continue;
        for (std::int64_t j = offsets[i]; j < offsets[i + 1]; ++j) *out++ = static_cast<T>(ids[j]);
        if (eod >= 0) *out++ = static_cast<T>(eod);
    }
}

}  // namespace

void pack_tokens(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
                 std::uint8_t which, std::int64_t eod, int item_bytes, std::uint8_t* out) {
    if (item_bytes == 2)
        pack(ids, offsets, documents, route, which, eod, reinterpret_cast<std::uint16_t*>(out));
    else
        pack(ids, offsets, documents, route, which, eod, reinterpret_cast<std::int32_t*>(out));
}

}  // namespace demix
