#include "document_stream.hpp"

#include <algorithm>
#include <numeric>

#include "mix.hpp"
#include "parallel.hpp"
#include "unaligned.hpp"

namespace demix {

Shuffle::Shuffle(std::uint64_t n, std::uint64_t key) : n_(n) {
    int bits = 8;  // tiny sets walk a little; below this a few rounds would not mix
    while (bits < 63 && (1ull << bits) < n) ++bits;
    left_bits_ = bits / 2;
    right_bits_ = bits - left_bits_;
    for (auto& k : keys_) k = key = mix(key + 0x9e3779b97f4a7c15ull);
}

std::uint64_t Shuffle::once(std::uint64_t i) const {
    // Halves of unequal width swap roles, so two rounds restore the split.
    std::uint64_t left = i >> right_bits_, right = i & ((1ull << right_bits_) - 1);
    const std::uint64_t left_mask = (1ull << left_bits_) - 1, right_mask = (1ull << right_bits_) - 1;
    for (int r = 0; r < kRounds; r += 2) {
        left ^= fold(right ^ keys_[r], 0x9e3779b97f4a7c15ull) & left_mask;
        right ^= fold(left ^ keys_[r + 1], 0xd6e8feb86659fd93ull) & right_mask;
    }
    return left << right_bits_ | right;
}

void Shuffle::batch(std::uint64_t first, int count, std::uint64_t* out) const {
    std::uint8_t outside[kBatch];
    int left = 0;
    for (int j = 0; j < count; ++j) {
        out[j] = once(first + static_cast<std::uint64_t>(j));
        outside[left] = static_cast<std::uint8_t>(j);
        left += out[j] >= n_;
    }
    while (left > 0) {
        int still = 0;
        for (int k = 0; k < left; ++k) {
            const int j = outside[k];
            out[j] = once(out[j]);
            outside[still] = static_cast<std::uint8_t>(j);
            still += out[j] >= n_;
        }
        left = still;
    }
}

Stream::Stream(std::vector<Source> sources, std::uint64_t seed) : sources_(std::move(sources)), seed_(seed) {
    for (const auto& s : sources_) {
        first_.push_back(documents_);
        documents_ += s.documents;
    }
    first_.push_back(documents_);
    // About four entries a source, so that most entries name the source itself.
    while ((documents_ >> shift_) > 4 * static_cast<std::int64_t>(sources_.size())) ++shift_;
    for (std::int64_t begin = 0; begin <= documents_; begin += std::int64_t{1} << shift_) {
        const auto after = std::upper_bound(first_.begin(), first_.end() - 1, begin);
        candidates_.push_back(static_cast<std::uint32_t>(after - first_.begin() - 1));
    }
}

const Source& Stream::find(std::int64_t document, std::int64_t& entry) const {
    std::size_t which = candidates_[static_cast<std::size_t>(document >> shift_)];
    if (document >= first_[which + 1]) {
        const auto bucket = static_cast<std::size_t>(document >> shift_) + 1;
        const auto last = bucket < candidates_.size() ? first_.begin() + candidates_[bucket] + 1 : first_.end() - 1;
        which = static_cast<std::size_t>(std::upper_bound(first_.begin() + static_cast<std::ptrdiff_t>(which), last, document) - first_.begin() - 1);
    }
    entry = document - first_[which];
    return sources_[which];
}

// Index entries on their way from memory.
struct Stream::Batch {
    const Source* source[Shuffle::kBatch];
    std::int64_t entry[Shuffle::kBatch];
    int count = 0;
};

void Stream::fetch(const Shuffle& shuffle, std::int64_t start, std::int64_t left, bool with_pointers, Batch& batch) const {
    std::uint64_t document[Shuffle::kBatch];
    batch.count = static_cast<int>(std::min<std::int64_t>(Shuffle::kBatch, std::max<std::int64_t>(0, left)));
    shuffle.batch(static_cast<std::uint64_t>(start), batch.count, document);
    for (int j = 0; j < batch.count; ++j) {
        const Source& s = find(static_cast<std::int64_t>(document[j]), batch.entry[j]);
        batch.source[j] = &s;
        if (with_pointers) {
            const std::uint8_t* pair = s.pointers + batch.entry[j] * 8;
            __builtin_prefetch(pair);
            __builtin_prefetch(pair + 15);
        }
        if (!with_pointers || !s.end_to_end()) __builtin_prefetch(s.lengths + batch.entry[j] * 4);
    }
}

void Stream::fill_one(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers) const {
    Batch batches[2];
    while (count > 0) {
        const std::int64_t epoch = begin / documents_, start = begin % documents_;
        const std::int64_t here = std::min(count, documents_ - start);
        const Shuffle shuffle(static_cast<std::uint64_t>(documents_), mix(seed_ + static_cast<std::uint64_t>(epoch)));
        fetch(shuffle, start, here, pointers != nullptr, batches[0]);
        int turn = 0;
        for (std::int64_t done = 0; done < here; turn ^= 1) {
            const Batch& batch = batches[turn];
            // Memory answers while the places of the next batch are computed.
            fetch(shuffle, start + done + batch.count, here - done - batch.count, pointers != nullptr, batches[turn ^ 1]);
            for (int j = 0; j < batch.count; ++j) {
                const Source& s = *batch.source[j];
                const std::int64_t entry = batch.entry[j];
                if (!pointers) {
                    lengths[j] = load<std::int32_t>(s.lengths + entry * 4);
                    continue;
                }
                const auto pointer = load<std::int64_t>(s.pointers + entry * 8);
                pointers[j] = s.base + pointer;
                lengths[j] = s.end_to_end() && entry + 1 < s.documents
                                 ? static_cast<std::int32_t>((load<std::int64_t>(s.pointers + entry * 8 + 8) - pointer) >> s.item_shift)
                                 : load<std::int32_t>(s.lengths + entry * 4);
            }
            lengths += batch.count;
            if (pointers) pointers += batch.count;
            done += batch.count;
        }
        begin += here;
        count -= here;
    }
}

void Stream::fill(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers, int threads) const {
    parallel(count, threads, 1 << 13, [&](std::int64_t from, std::int64_t to) {
        fill_one(begin + from, to - from, lengths + from, pointers ? pointers + from : nullptr);
    });
}

Advance advance(const Stream& stream, std::int64_t begin, std::int64_t budget, std::int64_t epoch_tokens, int threads) {
    constexpr std::int64_t kBlock = 1 << 18;
    const std::int64_t epoch_documents = stream.documents();
    std::vector<std::int32_t> lengths;
    const auto read = [&](std::int64_t from, std::int64_t to) {
        lengths.resize(static_cast<std::size_t>(to - from));
        stream.fill(from, to - from, lengths.data(), nullptr, threads);
    };
    // From the start of the epoch that `begin` lies in: what comes before it counts as budget, too.
    const std::int64_t first = begin - begin % epoch_documents;
    std::int64_t before = 0;
    for (std::int64_t from = first; from < begin; from += kBlock) {
        read(from, std::min(from + kBlock, begin));
        before = std::accumulate(lengths.begin(), lengths.end(), before);
    }
    // Whole epochs cost the same in any order; only the last one is walked, from its nearer end.
    const std::int64_t epochs = (before + budget) / epoch_tokens, rest = (before + budget) % epoch_tokens;
    const std::int64_t epoch = first + epochs * epoch_documents;
    const auto found = [&](std::int64_t documents, std::int64_t tokens, std::int64_t next_length) {
        return Advance{epoch + documents - begin, epochs * epoch_tokens + tokens - before, next_length};
    };
    if (rest <= epoch_tokens / 2) {
        std::int64_t tokens = 0;
        for (std::int64_t from = 0;; from += kBlock) {
            read(epoch + from, epoch + std::min(from + kBlock, epoch_documents));
            for (std::size_t i = 0; i < lengths.size(); ++i) {
                if (tokens + lengths[i] > rest) return found(from + static_cast<std::int64_t>(i), tokens, lengths[i]);
                tokens += lengths[i];
            }
        }
    }
    std::int64_t tokens = epoch_tokens;  // of the documents before `to`
    for (std::int64_t to = epoch_documents;; to -= kBlock) {
        const std::int64_t from = std::max<std::int64_t>(0, to - kBlock);
        read(epoch + from, epoch + to);
        for (std::size_t i = lengths.size(); i-- > 0;) {
            tokens -= lengths[i];
            if (tokens <= rest) return found(from + static_cast<std::int64_t>(i), tokens, lengths[i]);
        }
    }
}

}  // namespace demix
