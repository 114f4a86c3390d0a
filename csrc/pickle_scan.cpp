#include "pickle_scan.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace demix {
namespace {

enum class Argument { none, fixed, counted, line, two_lines, memo_index, memo_line, get_line, frame, stop, unknown };

struct Opcode {
    Argument argument;
    int width;  // bytes of the argument, or of its count
};

Opcode opcode(unsigned char op) {
    switch (op) {
        case '.': return {Argument::stop, 0};
        case 'K': case 'h': case 0x80: case 0x82: return {Argument::fixed, 1};
        case 'M': case 0x83: return {Argument::fixed, 2};
        case 'J': case 'j': case 0x84: return {Argument::fixed, 4};
        case 'G': return {Argument::fixed, 8};
        case 0x95: return {Argument::frame, 8};
        case 'q': return {Argument::memo_index, 1};
        case 'r': return {Argument::memo_index, 4};
        case 'p': return {Argument::memo_line, 0};
        case 'U': case 'C': case 0x8a: case 0x8c: return {Argument::counted, 1};
        case 'T': case 'B': case 'X': case 0x8b: return {Argument::counted, 4};
        case 0x8d: case 0x8e: case 0x96: return {Argument::counted, 8};
        case 'F': case 'I': case 'L': case 'S': case 'V': case 'P': return {Argument::line, 0};
        case 'g': return {Argument::get_line, 0};
        case 'c': case 'i': return {Argument::two_lines, 0};
        default: break;
    }
    if (op != 0 && op < 0x80 && std::strchr("(012NQRabd}elo]st)u", op)) return {Argument::none, 0};
    if (op == 0x81 || (op >= 0x85 && op <= 0x89) || (op >= 0x8f && op <= 0x94)) return {Argument::none, 0};
    return {Argument::unknown, 0};
}

std::uint64_t little_endian(const unsigned char* p, int width) {
    std::uint64_t value = 0;
    for (int i = width - 1; i >= 0; --i) value = value << 8 | p[i];
    return value;
}

// The reader's stack and memo, with sizes in place of objects: how many values one visits who follows an object without noticing
// which of its parts are one object, as hashing does. It is exact for what can be hashed, whose parts exist before it.
class Machine {
public:
    // Takes a step; index: of the memo, for the opcodes that have one. False where the reader would fail.
    bool step(unsigned char op, std::size_t index) {
        switch (op) {
            case '(': marks_.push_back(stack_.size()); return true;
            case '0': {
                if (!marks_.empty() && marks_.back() == stack_.size()) return marks_.pop_back(), true;
                return pop(1);
            }
            case '1': return marked() && cut();
            case '2': return has(1) && push(stack_.back());
            case ']': case '}': case 0x8f: return push_new(1);
            case 'a': return has(2) && grow(stack_[stack_.size() - 2], size(stack_.back())) && pop(1);
            case 'e': return marked() && below() && grow(stack_[marks_.back() - 1], sum(1)) && cut();
            case 's': {
                if (!has(3)) return false;
                const std::size_t top = stack_.size();
                hash(stack_[top - 2]);
                return grow(stack_[top - 3], size(stack_[top - 2]) + size(stack_[top - 1])) && pop(2);
            }
            case 'u': return marked() && below() && hash_all(2) && grow(stack_[marks_.back() - 1], sum(1)) && cut();
            case 0x90: return marked() && below() && hash_all(1) && grow(stack_[marks_.back() - 1], sum(1)) && cut();
            case 'd': return marked() && hash_all(2) && gather();
            case 0x91: return marked() && hash_all(1) && gather();
            case 'l': case 't': case 'i': case 'o': return marked() && gather();
            case 0x85: return gather(1);
            case 0x86: case 'R': case 0x81: return gather(2);
            case 0x93: return pop(2) && push(atom);
            case 0x87: case 0x92: return gather(3);
            case 'b': return pop(1);
            case 'Q': return has(1);
            case 'q': case 'r': case 'p': return has(1) && put(index);
            case 0x94: return has(1) && put(remembered_);
            case 'h': case 'j': case 'g': return index < memo_.size() && memo_[index] && push(memo_[index]);
            case 0x80: case 0x95: return true;
            default: return push(atom);
        }
    }

    std::uint64_t hashed() const { return hashed_; }

private:
    static constexpr std::uint64_t most = std::uint64_t(1) << 60;
    static constexpr std::uint32_t atom = 1;  // 0: nothing

    std::uint64_t size(std::uint32_t object) const { return sizes_[object]; }
    bool has(std::size_t n) const { return stack_.size() >= n + (marks_.empty() ? 0 : marks_.back()); }
    bool marked() const { return !marks_.empty(); }
    bool below() const { return marks_.back() > (marks_.size() > 1 ? marks_[marks_.size() - 2] : 0); }
    bool push(std::uint32_t object) { return stack_.push_back(object), true; }
    bool pop(std::size_t n) { return has(n) && (stack_.resize(stack_.size() - n), true); }
    bool cut() { return stack_.resize(marks_.back()), marks_.pop_back(), true; }
    bool push_new(std::uint64_t size) {
        sizes_.push_back(std::min(size, most));
        return push(std::uint32_t(sizes_.size() - 1));
    }
    bool grow(std::uint32_t object, std::uint64_t by) {
        if (object != atom) sizes_[object] = std::min(sizes_[object] + by, most);
        return true;
    }
    std::uint64_t sum(std::size_t step) const {
        std::uint64_t total = 0;
        for (std::size_t i = marks_.back(); i < stack_.size(); i += step) total = std::min(total + size(stack_[i]), most);
        return total;
    }
    void hash(std::uint32_t object) { hashed_ = std::min(hashed_ + size(object), most); }
    bool hash_all(std::size_t step) { return hashed_ = std::min(hashed_ + sum(step), most), true; }
    // One object in place of those above the mark, or of the last n.
    bool gather() {
        const std::uint64_t total = sum(1) + 1;
        return cut() && push_new(total);
    }
    bool gather(std::size_t n) {
        if (!has(n)) return false;
        std::uint64_t total = 1;
        for (std::size_t i = stack_.size() - n; i < stack_.size(); ++i) total += size(stack_[i]);
        return pop(n) && push_new(total);
    }
    bool put(std::size_t index) {
        if (index >= memo_.size()) memo_.resize(std::max(index + 1, memo_.size() * 2));
        remembered_ += !memo_[index];
        memo_[index] = stack_.back();
        return true;
    }

    std::vector<std::uint64_t> sizes_{0, 1};
    std::vector<std::uint32_t> stack_, memo_;
    std::vector<std::size_t> marks_;
    std::size_t remembered_ = 0;
    std::uint64_t hashed_ = 0;
};

}  // namespace

std::int64_t pickle_scan(const unsigned char* data, std::size_t n) {
    std::size_t at = 0, frame_end = 0;
    Machine machine;
    const std::uint64_t most_hashed = 64 * std::uint64_t(n) + (1 << 16);
    while (at < n) {
        const std::size_t start = at;
        std::size_t index = 0;
        const Opcode op = opcode(data[at++]);
        const std::size_t left = n - at;
        switch (op.argument) {
            case Argument::stop: return -1;
            case Argument::none: break;
            case Argument::fixed:
            case Argument::memo_index:
                if (left < std::size_t(op.width)) return std::int64_t(start);
                index = std::size_t(little_endian(data + at, op.width));
                if (op.argument == Argument::memo_index && index > n) return std::int64_t(start);
                at += op.width;
                break;
            case Argument::counted: {
                if (left < std::size_t(op.width)) return std::int64_t(start);
                const std::uint64_t count = little_endian(data + at, op.width);
                if (count > left - op.width) return std::int64_t(start);
                at += op.width + count;
                break;
            }
            case Argument::line:
            case Argument::two_lines:
            case Argument::memo_line:
            case Argument::get_line:
                for (int lines = op.argument == Argument::two_lines ? 2 : 1; lines; --lines) {
                    const void* end = std::memchr(data + at, '\n', n - at);
                    if (!end) return std::int64_t(start);
                    const std::size_t next = std::size_t(static_cast<const unsigned char*>(end) - data) + 1;
                    // 9 digits and more exceed what a pickle of this size could need.
                    if (op.argument == Argument::memo_line || op.argument == Argument::get_line) {
                        if (next - at > 10) return std::int64_t(start);
                        for (std::size_t i = at; i + 1 < next; ++i) {
                            if (data[i] < '0' || data[i] > '9') return std::int64_t(start);
                            index = index * 10 + (data[i] - '0');
                        }
                        if (index > n) return std::int64_t(start);
                    }
                    at = next;
                }
                break;
            case Argument::frame: {
                if (start < frame_end || left < std::size_t(op.width)) return std::int64_t(start);
                const std::uint64_t bytes = little_endian(data + at, op.width);
                if (bytes > left - op.width) return std::int64_t(start);
                at += op.width;
                frame_end = at + bytes;
                break;
            }
            case Argument::unknown: return std::int64_t(start);
        }
        if (!machine.step(data[start], index) || machine.hashed() > most_hashed) return std::int64_t(start);
        if (start < frame_end && at > frame_end) return std::int64_t(start);
    }
    return std::int64_t(n);  // no STOP
}

}  // namespace demix
