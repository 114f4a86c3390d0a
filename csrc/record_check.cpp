#include "record_check.hpp"

#include <algorithm>

#include "crc32.hpp"

namespace demix {
namespace {

// Whether all sources of a region that are read lie at the same place of records of the same size, in runs, and have one type.
bool lie_alike(const MergePlan& plan, const Target& t, const Region& r, const std::vector<int>& read) {
    const int dims = t.dims;
    const auto record = [&](int k) -> const Record& { return plan.records()[std::size_t(r.records[std::size_t(k)])]; };
    const auto strides = [&](int k) { return r.strides.begin() + std::ptrdiff_t(k) * dims; };
    const int first = read[0];
    if (strides(first)[dims - 1] != 1) return false;
    for (const int k : read)
        if (t.stored[std::size_t(k)] != t.stored[std::size_t(first)] || record(k).bytes != record(first).bytes ||
            r.sources[std::size_t(k)] - record(k).base != r.sources[std::size_t(first)] - record(first).base ||
            !std::equal(strides(k), strides(k) + dims, strides(first)))
            return false;
    return true;
}

}  // namespace

RecordCheck::RecordCheck(const MergePlan& plan, const std::vector<int>& read)
    : plan_(plan), read_(read), leaders_(plan.records().size(), -1), crcs_(plan.records().size()), bytes_(plan.records().size()) {
    if (read.size() < 2 || read.size() > max_staggered) return;
    std::vector<bool> apart(leaders_.size(), false);  // by leader
    for (const Target& t : plan.targets())
        for (const Region& r : t.regions) {
            std::vector<std::int32_t> group;
            for (const int k : read) group.push_back(r.records[std::size_t(k)]);
            const std::int32_t leader = group[0];
            const auto& known = groups_.try_emplace(leader, group).first->second;
            if (known != group || !lie_alike(plan, t, r, read)) apart[std::size_t(leader)] = true;
            // A record that is read with others elsewhere is added up with none, nor are those others.
            for (const std::int32_t record : group) {
                std::int32_t& its = leaders_[std::size_t(record)];
                if (its < 0) its = leader;
                if (its != leader) apart[std::size_t(its)] = apart[std::size_t(leader)] = true;
            }
        }
    for (std::int32_t& leader : leaders_)
        if (leader >= 0 && apart[std::size_t(leader)]) groups_.erase(leader), leader = -1;
}

void RecordCheck::add(std::int32_t record_index, std::uint32_t crc, std::uint64_t n, const char* end) {
    const Record& record = plan_.records()[std::size_t(record_index)];
    crcs_[std::size_t(record_index)].fetch_xor(crc32_shift(crc, record.bytes - std::uint64_t(end - record.base)));
    bytes_[std::size_t(record_index)].fetch_add(n, std::memory_order_relaxed);
}

std::vector<std::uint8_t> RecordCheck::damaged() const {
    const std::vector<Record>& records = plan_.records();
    std::vector<std::uint8_t> found(records.size(), 0);
    const auto promised = [&](std::int32_t record) {  // as crc32_raw gives it
        const Record& r = records[std::size_t(record)];
        return r.crc ^ crc32_finish(0, r.bytes);
    };
    const auto sound = [&](std::int32_t record) {
        const Record& r = records[std::size_t(record)];
        return r.crc == crc32(r.base, r.bytes);
    };
    for (std::int32_t i = 0; i < std::int32_t(records.size()); ++i) {
        const std::uint64_t read = bytes_[std::size_t(i)].load();
        if (read == 0) continue;
        const std::uint32_t crc = crcs_[std::size_t(i)].load();
        const bool whole = read == records[std::size_t(i)].bytes;
        if (leaders_[std::size_t(i)] < 0) {
            found[std::size_t(i)] = whole ? crc != promised(i) : !sound(i);
            continue;
        }
        const std::vector<std::int32_t>& group = groups_.at(i);
        std::uint32_t sum = 0;
        for (std::size_t j = 0; j < group.size(); ++j) sum ^= crc32_shift(promised(group[j]), j);
        if (whole && crc == sum) continue;
        bool any = false;
        for (const std::int32_t record : group) found[std::size_t(record)] = !sound(record), any = any || found[std::size_t(record)];
        // What was read is not what is there now.
        if (whole && !any) found[std::size_t(i)] = 1;
    }
    return found;
}

}  // namespace demix
