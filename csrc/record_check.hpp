// Compares what a merge has read with the CRCs that its sources' containers promise, piece by piece and in any order.
//
// Records that lie alike (the same part of a tensor, in records of the same size) are checked together: a CRC is linear, so the sum
// of their CRCs is the CRC of their sum, and adding costs a fraction of a CRC. They are added staggered (crc32.hpp), so that one
// damage that several of them share is found as surely as in one. Where a sum is wrong each is read again.
#pragma once

#include <atomic>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "merge.hpp"

namespace demix {

class RecordCheck {
public:
    // read: the sources that are read.
    RecordCheck(const MergePlan& plan, const std::vector<int>& read);

    // Whether the sources of a region are checked together.
    bool together(const Region& region) const { return !read_.empty() && leaders_[std::size_t(region.records[std::size_t(read_[0])])] >= 0; }

    // n bytes of a record, before `end`. crc: crc32_raw of them; of sources that are checked together, crc32_raw_staggered of all, for
    // the record of the first one.
    void add(std::int32_t record, std::uint32_t crc, std::uint64_t n, const char* end);

    // [records] 1 where other bytes were read than the CRC promises. Records of which a part was read are read again, whole.
    std::vector<std::uint8_t> damaged() const;

private:
    const MergePlan& plan_;
    const std::vector<int> read_;
    std::vector<std::int32_t> leaders_;  // [records] the first of those that are checked with this one, or -1
    std::unordered_map<std::int32_t, std::vector<std::int32_t>> groups_;  // by leader, in the order of read_
    std::vector<std::atomic<std::uint32_t>> crcs_;  // [records]
    std::vector<std::atomic<std::uint64_t>> bytes_;
};

}  // namespace demix
