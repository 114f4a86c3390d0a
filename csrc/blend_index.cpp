#include "blend_index.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>
#include <unistd.h>

namespace demix {
namespace {

template <class T>
T load(const std::uint8_t* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

template <class T>
void store(std::uint8_t* p, T value) {
    std::memcpy(p, &value, sizeof value);
}

// The finaliser of splitmix64 (Steele, Lea and Flood, 2014).
std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

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

}  // namespace

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

Stream::Stream(std::vector<Source> sources, std::uint64_t seed) : sources_(std::move(sources)), seed_(seed) {
    for (const auto& s : sources_) {
        first_.push_back(documents_);
        documents_ += s.documents;
    }
}

void Stream::fill_one(std::int64_t begin, std::int64_t count, std::int32_t* lengths, std::int64_t* pointers) const {
    constexpr int kBatch = 32;  // documents whose index entries are fetched from memory at the same time
    const Source* source[kBatch];
    std::int64_t entry[kBatch];
    while (count > 0) {
        const std::int64_t epoch = begin / documents_, start = begin % documents_;
        const std::int64_t here = std::min(count, documents_ - start);
        const Shuffle shuffle(static_cast<std::uint64_t>(documents_), mix(seed_ + static_cast<std::uint64_t>(epoch)));
        for (std::int64_t done = 0; done < here; done += kBatch) {
            const int batch = static_cast<int>(std::min<std::int64_t>(kBatch, here - done));
            for (int j = 0; j < batch; ++j) {
                const auto document = static_cast<std::int64_t>(shuffle(static_cast<std::uint64_t>(start + done + j)));
                const auto which =
                    first_.size() == 1 ? 0 : std::upper_bound(first_.begin(), first_.end(), document) - first_.begin() - 1;
                source[j] = &sources_[which];
                entry[j] = document - first_[which];
                __builtin_prefetch(source[j]->lengths + entry[j] * 4);
                if (pointers) __builtin_prefetch(source[j]->pointers + entry[j] * 8);
            }
            for (int j = 0; j < batch; ++j) {
                lengths[j] = load<std::int32_t>(source[j]->lengths + entry[j] * 4);
                if (pointers) pointers[j] = source[j]->base + load<std::int64_t>(source[j]->pointers + entry[j] * 8);
            }
            lengths += batch;
            if (pointers) pointers += batch;
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

void interleave(std::vector<Part>& parts, std::uint8_t* out_lengths, std::uint8_t* out_pointers, std::uint16_t* out_part,
                int threads) {
    constexpr std::int64_t kBlock = 1 << 16;
    struct Queue {
        std::vector<std::int32_t> lengths;
        std::vector<std::int64_t> pointers;
        std::int64_t next = 0, filled = 0, left = 0, position = 0, emitted = 0;
        double share = 0, per_token = 0;
    };
    const std::size_t n = parts.size();
    std::vector<Queue> queues(n);
    std::vector<double> start(n), finish(n);  // virtual times, in tokens of the whole blend
    std::int64_t total_documents = 0, total_tokens = 0;
    for (const auto& p : parts) {
        total_documents += p.documents;
        total_tokens += p.tokens;
    }
    constexpr double kNever = std::numeric_limits<double>::infinity();
    const auto refresh = [&](std::size_t d) {
        Queue& q = queues[d];
        if (q.next == q.filled) {
            if (q.left == 0) {
                start[d] = finish[d] = kNever;
                return;
            }
            q.filled = std::min(kBlock, q.left);
            q.next = 0;
            q.lengths.resize(static_cast<std::size_t>(q.filled));
            q.pointers.resize(static_cast<std::size_t>(q.filled));
            parts[d].stream->fill(q.position, q.filled, q.lengths.data(), q.pointers.data(), threads);
            q.position += q.filled;
            q.left -= q.filled;
        }
        start[d] = static_cast<double>(q.emitted) * q.per_token;
        finish[d] = static_cast<double>(q.emitted + q.lengths[static_cast<std::size_t>(q.next)]) * q.per_token;
    };
    for (std::size_t d = 0; d < n; ++d) {
        Queue& q = queues[d];
        q.left = parts[d].documents;
        q.position = parts[d].begin;
        q.share = total_tokens ? static_cast<double>(parts[d].tokens) / static_cast<double>(total_tokens) : 0;
        q.per_token = parts[d].tokens ? static_cast<double>(total_tokens) / static_cast<double>(parts[d].tokens) : 0;
        refresh(d);
    }
    std::vector<double> ahead(n, 0), behind(n, 0);
    std::int64_t now = 0;
    for (std::int64_t i = 0; i < total_documents; ++i) {
        // Among the parts that are not ahead of their share, the one whose next document is due first. No branches: which part
        // comes next is as good as random, and a mispredicted one costs more than the rest of the loop.
        std::size_t best = n;
        double due = kNever;
        const auto time = static_cast<double>(now);
        for (std::size_t d = 0; d < n; ++d) {
            const double candidate = start[d] <= time ? finish[d] : kNever;
            best = candidate < due ? d : best;
            due = candidate < due ? candidate : due;
        }
        // Only by rounding is nobody eligible; then whoever is least ahead.
        if (best == n) best = static_cast<std::size_t>(std::min_element(start.begin(), start.end()) - start.begin());
        Queue& q = queues[best];
        const auto j = static_cast<std::size_t>(q.next++);
        behind[best] = std::max(behind[best], time * q.share - static_cast<double>(q.emitted));
        q.emitted += q.lengths[j];
        now += q.lengths[j];
        ahead[best] = std::max(ahead[best], static_cast<double>(q.emitted) - static_cast<double>(now) * q.share);
        store(out_lengths + i * 4, q.lengths[j]);
        store(out_pointers + i * 8, q.pointers[j]);
        out_part[i] = static_cast<std::uint16_t>(best);
        refresh(best);
    }
    for (std::size_t d = 0; d < n; ++d) {
        parts[d].ahead = static_cast<std::int64_t>(std::ceil(ahead[d]));
        parts[d].behind = static_cast<std::int64_t>(std::ceil(behind[d]));
    }
}

Gathered gather(const std::uint8_t* lengths, const std::uint8_t* pointers, std::int64_t begin, std::int64_t end,
                int item_bytes, const std::vector<Span>& spans, int descriptor, std::int64_t offset, int threads) {
    std::vector<std::int64_t> bases;
    for (const auto& s : spans) bases.push_back(s.base);
    // Where each piece of documents starts in the output.
    const std::int64_t count = end - begin;
    const auto pieces = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count / 64));
    std::vector<std::int64_t> at(static_cast<std::size_t>(pieces) + 1, offset);
    for (std::int64_t p = 0, i = begin; p < pieces; ++p) {
        std::int64_t bytes = 0;
        for (; i < begin + count * (p + 1) / pieces; ++i) bytes += static_cast<std::int64_t>(load<std::int32_t>(lengths + i * 4)) * item_bytes;
        at[static_cast<std::size_t>(p) + 1] = at[static_cast<std::size_t>(p)] + bytes;
    }
    std::atomic<int> error{0};
    std::atomic<std::uint64_t> content{0};
    // File systems let one writer into a file at a time and have the others spin; here they sleep, and collect meanwhile.
    std::mutex writing;
    const auto work = [&](std::int64_t piece) {
        constexpr std::size_t kBuffer = 1 << 19;
        std::vector<std::uint8_t> buffer(kBuffer);
        std::size_t used = 0;
        std::uint64_t sum = 0;
        std::int64_t position = at[static_cast<std::size_t>(piece)];
        const auto write = [&](const std::uint8_t* data, std::size_t bytes) {
            const std::lock_guard<std::mutex> only(writing);
            while (bytes > 0 && error == 0) {
                const ssize_t written = ::pwrite(descriptor, data, bytes, position);
                if (written < 0) {
                    if (errno != EINTR) error = errno;
                    continue;
                }
                data += written;
                position += written;
                bytes -= static_cast<std::size_t>(written);
            }
        };
        const std::int64_t to = begin + count * (piece + 1) / pieces;
        for (std::int64_t i = begin + count * piece / pieces; i < to && error == 0; ++i) {
            const auto bytes = static_cast<std::size_t>(load<std::int32_t>(lengths + i * 4)) * static_cast<std::size_t>(item_bytes);
            const auto pointer = load<std::int64_t>(pointers + i * 8);
            const auto& span =
                spans.size() == 1 ? spans[0]
                                  : spans[static_cast<std::size_t>(std::upper_bound(bases.begin(), bases.end(), pointer) - bases.begin() - 1)];
            const std::uint8_t* data = span.data + (pointer - span.base);
            sum += hash_document(data, static_cast<std::int64_t>(bytes), static_cast<std::uint64_t>(i));
            if (used + bytes > kBuffer) {
                write(buffer.data(), used);
                used = 0;
            }
            if (bytes > kBuffer) {
                write(data, bytes);
            } else {
                std::memcpy(buffer.data() + used, data, bytes);
                used += bytes;
            }
        }
        write(buffer.data(), used);
        content += sum;
    };
    std::vector<std::thread> others;
    for (std::int64_t p = 1; p < pieces; ++p) others.emplace_back(work, p);
    work(0);
    for (auto& t : others) t.join();
    return {error, content};
}

std::uint64_t hash_document(const std::uint8_t* data, std::int64_t bytes, std::uint64_t seed) {
    constexpr std::uint64_t kA = 0x2d358dccaa6c78a5ull, kB = 0x8bb84b93962eacc9ull;
    std::uint64_t h = mix(seed ^ kA) ^ static_cast<std::uint64_t>(bytes);
    for (; bytes >= 16; bytes -= 16, data += 16)
        h = fold(load<std::uint64_t>(data) ^ kA ^ h, load<std::uint64_t>(data + 8) ^ kB);
    std::uint8_t tail[16] = {};
    std::memcpy(tail, data, static_cast<std::size_t>(bytes));
    return mix(fold(load<std::uint64_t>(tail) ^ kA ^ h, load<std::uint64_t>(tail + 8) ^ kB));
}

void hash_documents(const std::uint8_t* content, const std::int64_t* offsets, std::int64_t documents, std::uint64_t seed,
                    std::uint64_t step, std::uint64_t* out) {
    for (std::int64_t i = 0; i < documents; ++i)
        out[i] = hash_document(content + offsets[i], offsets[i + 1] - offsets[i], seed + static_cast<std::uint64_t>(i) * step);
}

namespace {

template <class T>
void pack(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
          std::uint8_t which, std::int64_t eod, T* out) {
    for (std::int64_t i = 0; i < documents; ++i) {
        if (route && route[i] != which) continue;
        for (std::int64_t j = offsets[i]; j < offsets[i + 1]; ++j) *out++ = static_cast<T>(ids[j]);
        if (eod >= 0) *out++ = static_cast<T>(eod);
    }
}

}  // namespace

void pack_tokens(const std::uint32_t* ids, const std::int64_t* offsets, std::int64_t documents, const std::uint8_t* route,
                 std::uint8_t which, std::int64_t eod, int item_bytes, std::uint8_t* out) {
    if (item_bytes == 2)
        pack(ids, offsets, documents, route, which, eod, reinterpret_cast<std::uint16_t*>(out));
    else
        pack(ids, offsets, documents, route, which, eod, reinterpret_cast<std::int32_t*>(out));
}

}  // namespace demix
