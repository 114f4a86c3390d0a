// Work spread over threads that end before the call does.
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace demix {

// Runs work(begin, end) over [0, count) in at most `threads` pieces. Pieces below `least` are not worth a thread.
template <class Work>
void parallel(std::int64_t count, int threads, std::int64_t least, const Work& work) {
    const auto pieces = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count / least));
    std::vector<std::thread> others;
    for (std::int64_t p = 1; p < pieces; ++p)
        others.emplace_back([&, p] { work(count * p / pieces, count * (p + 1) / pieces); });
    work(0, count / pieces);
    for (auto& t : others) t.join();
}

}  // namespace demix
