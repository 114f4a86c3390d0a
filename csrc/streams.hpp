// How many sources of a merge are read side by side.
#pragma once

#include <cstddef>

namespace demix {

// Checkpoints that were saved alike have the same elements at the same place of a page, so that the lines of all sources share one set
// of a first-level cache (8 lines, 12 in newer ones), and a processor follows about as many streams: sixteen at once are much slower
// than two groups of eight.
inline constexpr std::size_t most_streams = 8;

}  // namespace demix
