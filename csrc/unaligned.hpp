// Values at addresses that need not be aligned, as in a mapped .idx, whose arrays begin at byte 34.
#pragma once
#include <cstdint>
#include <cstring>

namespace demix {

template <class T>
T load(const std::uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

}  // namespace demix
