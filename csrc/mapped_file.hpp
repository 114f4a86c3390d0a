// Files that are read through memory maps may be cut short, or their disk may fail, while they are read: the kernel then sends SIGBUS.
#pragma once

#include <cstddef>

namespace demix {

struct WatchedMap;

// From now on, where the file behind these bytes cannot be read, the rest of the map becomes zeros and the process goes on; what it
// computes from them does not count, which is_lost() says. bytes: of a whole map that begins at a page. The first call installs a
// handler of SIGBUS, which passes on what is not about a watched map.
WatchedMap* watch_map(const void* address, std::size_t bytes);

bool is_lost(const WatchedMap* map);

// Before the bytes are unmapped, or their addresses used for anything else.
void unwatch_map(WatchedMap* map);

}  // namespace demix
