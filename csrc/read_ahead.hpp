// Asks the disk for what a merge will read soon, where it is not in the page cache.
#pragma once

#include <atomic>

#include "merge_tile.hpp"

namespace demix {

// Walks the sources in the order in which tiles use them, a bounded distance ahead of what is done, until all is asked for or
// `finished`. To be run by a thread of its own. A page fault reads ahead in one file at a time and makes its thread wait; here all
// sources are on their way together. Where nothing has to be read it costs a system call for each piece of megabytes.
void read_ahead(const Execution& execution, const std::atomic<bool>& finished);

}  // namespace demix
