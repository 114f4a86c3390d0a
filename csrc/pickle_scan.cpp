#include "pickle_scan.hpp"

#include <cstring>

namespace demix {
namespace {

enum class Argument { none, fixed, counted, line, two_lines, memo_index, memo_line, frame, stop, unknown };

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
        case 'F': case 'I': case 'L': case 'S': case 'V': case 'g': case 'P': return {Argument::line, 0};
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

}  // namespace

std::int64_t pickle_scan(const unsigned char* data, std::size_t n) {
    std::size_t at = 0, frame_end = 0;
    while (at < n) {
        const std::size_t start = at;
        const Opcode op = opcode(data[at++]);
        const std::size_t left = n - at;
        switch (op.argument) {
            case Argument::stop: return -1;
            case Argument::none: break;
            case Argument::fixed:
            case Argument::memo_index:
                if (left < std::size_t(op.width)) return std::int64_t(start);
                if (op.argument == Argument::memo_index && little_endian(data + at, op.width) > n) return std::int64_t(start);
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
                for (int lines = op.argument == Argument::two_lines ? 2 : 1; lines; --lines) {
                    const void* end = std::memchr(data + at, '\n', n - at);
                    if (!end) return std::int64_t(start);
                    const std::size_t next = std::size_t(static_cast<const unsigned char*>(end) - data) + 1;
                    // 9 digits and more exceed what a pickle of this size could need.
                    if (op.argument == Argument::memo_line) {
                        std::uint64_t index = 0;
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
        if (start < frame_end && at > frame_end) return std::int64_t(start);
    }
    return std::int64_t(n);  // no STOP
}

}  // namespace demix
