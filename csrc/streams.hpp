// How many sources of a merge are read side by side.
#pragma once

#include <cstddef>

namespace demix {

// Checkpoints that were saved alike have the same elements at the same place of a page, so that the lines of all sources share one set
// of a first-level cache (8 lines, 12 in newer ones), and a processor follows about as many streams: sixteen at once are much slower
// than two groups of eight.
//
// Loops over sources are unrolled, so that each has load instructions of its own. Processors prefetch by the addresses that one
// instruction has loaded from: they take sources that lie at about equal distances for one series, and fetch what nobody reads, at a
// third of the speed (Zen 5, four sources or more whose distances are 2, 4 or 6 MiB modulo 64).
inline constexpr std::size_t most_streams = 8;

}  // namespace demix
