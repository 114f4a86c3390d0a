// A look at a pickle before it is read: opcodes, lengths and how large its keys are; nothing is built.
#pragma once

#include <cstddef>
#include <cstdint>

namespace demix {

// The offset of the first thing that no honest pickle holds, or -1. Such are: an unknown opcode, an argument that runs past the end,
// a memo index larger than the pickle (Python's reader would allocate memory for all indices below it), and a frame that begins within
// another one, or that an argument leaves (Python's reader in C skips what it had left of the first, and so reads other opcodes than
// were looked at here), an opcode that finds too little on the stack or in the memo, and keys that share their parts so often that
// hashing them, which sees each part as often as it is shared, is far more work than reading the pickle.
std::int64_t pickle_scan(const unsigned char* data, std::size_t n);

}  // namespace demix
