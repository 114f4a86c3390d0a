#include "merge.hpp"

#include <cerrno>
#include <stdexcept>

#include "crc32.hpp"
#include "kernels.hpp"
#include "merge_tile.hpp"
#include "parallel.hpp"
#include "read_ahead.hpp"

namespace demix {

void MergePlan::count(int more) {
    const std::lock_guard<std::mutex> lock(counting_);
    calls_ += more;
    if (!calls_) none_.notify_all();
}

void MergePlan::end() {
    cancel();
    std::unique_lock<std::mutex> lock(counting_);
    none_.wait(lock, [&] { return calls_ == 0; });
}

Outcome MergePlan::run(const Settings& settings, const Destinations& to) {
    const std::size_t num_results = targets_.size() * std::size_t(settings.num_mixtures);
    const bool to_files = to.addresses.empty();
    const bool direct_fits = to.direct_descriptors.empty() || to.direct_descriptors.size() == num_results;
    if (to_files ? to.descriptors.size() != num_results || to.offsets.size() != targets_.size() || !direct_fits
                 : to.addresses.size() != num_results)
        throw std::invalid_argument("destinations do not match the plan's targets");
    for (const Target& t : targets_)
        for (const Region& r : t.regions)
            if (r.weight_set >= settings.num_sets) throw std::invalid_argument("a region names a weight set that is not given");
    Execution x{*this, settings, to, kernels(settings.isa), make_weight_sets(settings, num_sources_), {}, {0},
                std::vector<std::atomic<std::uint32_t>>(to_files ? num_results : 0),
                std::vector<std::atomic<std::uint8_t>>(to_files ? targets_.size() : 0), nullptr};
    if (settings.check_sources && !x.sets.empty()) x.check = std::make_unique<RecordCheck>(*this, x.sets[0].read);
    for (const Target& t : targets_) {
        x.tilings.push_back(make_tiling(t, settings.tile_bytes));
        x.first_tile.push_back(x.first_tile.back() + x.tilings.back().num_tiles);
    }
    done_bytes_.store(0);

    const auto work = [&] {
        const IeeeArithmetic exact;
        try {
            TileWorker worker(x);
            std::size_t target = 0;
            while (!x.stop.load(std::memory_order_relaxed) && !cancelled_.load(std::memory_order_relaxed)) {
                const std::int64_t tile = x.next_tile.fetch_add(1);
                if (tile >= x.first_tile.back()) return;
                while (tile >= x.first_tile[target + 1]) ++target;
                done_bytes_.fetch_add(worker.make(std::int64_t(target), tile - x.first_tile[target]));
            }
        } catch (...) {
            x.stop.store(true);
            throw;
        }
    };
    // What goes to files is made once, and may be read from the disk for it; models in memory are made again and again.
    std::atomic<bool> finished{false};
    Threads reader;
    if (to_files) reader.start([&] { read_ahead(x, finished); });
    // A thread that writes to a file waits for the disk most of that time: a second one sums meanwhile.
    const int num_threads = std::max(1, settings.threads) * (to_files ? buffers_per_thread : 1);
    try {
        on_threads(num_threads, work);
    } catch (const std::bad_alloc&) {
        x.error.store(ENOMEM);
    }
    finished.store(true);
    reader.join();

    Outcome outcome;
    outcome.error = x.error.load();
    if (!outcome.error && cancelled_.load()) outcome.error = ECANCELED;
    outcome.failed_target = x.failed_target.load();
    if (outcome.error) return outcome;
    if (to_files)
        for (std::size_t t = 0, i = 0; t < targets_.size(); ++t)
            for (int m = 0; m < settings.num_mixtures; ++m, ++i)
                outcome.crcs.push_back(crc32_finish(x.target_crcs[i].load(), targets_[t].elements() * item_size(targets_[t].out)));
    for (const std::atomic<std::uint8_t>& seen : x.target_not_finite) outcome.not_finite.push_back(seen.load());
    if (x.check) outcome.damaged = x.check->damaged();
    return outcome;
}

}  // namespace demix
