// A target's sources read in the order of the target's own elements, however their chunks cut it. What is computed from rows that
// are read so does not depend on how a checkpoint was saved.
#pragma once

#include <cstdint>

#include "kernels.hpp"
#include "merge.hpp"

namespace demix {

class RowReader {
public:
    explicit RowReader(const Kernels& kernels) : kernels_(kernels) {}

    // Elements [begin, end) along the last dimension, widened to float32. row: index over all other dimensions together.
    // Throws std::invalid_argument if no region holds some of them.
    void read(const Target& t, int k, std::int64_t row, std::int64_t begin, std::int64_t end, float* out);

    static std::int64_t columns(const Target& t) { return t.shape[t.dims - 1]; }
    static std::int64_t rows(const Target& t) { return columns(t) ? std::int64_t(t.elements()) / columns(t) : 0; }

private:
    const Kernels& kernels_;
    std::size_t last_ = 0;  // the region that held the row before: likely the next one's, too
};

}  // namespace demix
