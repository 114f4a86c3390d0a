// Scratch memory of a thread.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace demix {

// Page aligned; grows only, and forgets what it held when it does.
template <class T>
class Buffer {
public:
    // Room for n elements. Throws std::bad_alloc.
    T* get(std::size_t n) {
        if (n > capacity_) {
            void* p = nullptr;
            memory_.reset();
            if (posix_memalign(&p, 4096, (n * sizeof(T) + 4095) / 4096 * 4096)) throw std::bad_alloc();
            memory_.reset(p);
            capacity_ = n;
        }
        return static_cast<T*>(memory_.get());
    }

private:
    std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
    std::size_t capacity_ = 0;
};

}  // namespace demix
