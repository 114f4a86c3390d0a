// Work spread over threads that end before the call does.
#pragma once
#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace demix {

// Threads that end before this does. A limit on processes or memory may let fewer start than are asked for.
class Threads {
public:
    Threads() = default;
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads() { join(); }

    // False where none more can start.
    template <class Work>
    bool start(Work&& work) {
        try {
            running_.emplace_back(std::forward<Work>(work));
            return true;
        } catch (const std::system_error&) {
            return false;
        } catch (const std::bad_alloc&) {
            return false;
        }
    }
    bool none() const { return running_.empty(); }
    void join() {
        for (std::thread& thread : running_) thread.join();
        running_.clear();
    }

private:
    std::vector<std::thread> running_;
};

// What a thread throws, kept for the one that started it; of several failures, one.
class Failure {
public:
    template <class Work>
    void keep(const Work& work) {
        try {
            work();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(keeping_);
            kept_ = std::current_exception();
        }
    }
    // Once all threads have ended.
    void rethrow() const {
        if (kept_) std::rethrow_exception(kept_);
    }

private:
    std::exception_ptr kept_;
    std::mutex keeping_;
};

// Calls work() on `threads` threads at once, or on as many as can start; here, where none can. Throws what `work` throws, when all
// have ended.
template <class Work>
void on_threads(int threads, const Work& work) {
    Failure failure;
    const auto kept = [&] { failure.keep(work); };
    Threads workers;
    for (int i = 0; i < threads && workers.start(kept); ++i) {}
    if (workers.none()) kept();
    workers.join();
    failure.rethrow();
}

// While it lives: nearest even, denormals kept. A caller that flushes them must not change a result, nor find them kept afterwards.
class IeeeArithmetic {
#if defined(__x86_64__)
public:
    IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    IeeeArithmetic(const IeeeArithmetic&) = delete;
    IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
    ~IeeeArithmetic() { _mm_setcsr(before_); }

private:
    unsigned before_;
#else
public:
    IeeeArithmetic() {}
#endif
};

// Runs work(begin, end) over [0, count) in at most `threads` pieces. Pieces below `least` are not worth a thread; those that get none
// are done by the caller. Throws what `work` throws.
template <class Work>
void parallel(std::int64_t count, int threads, std::int64_t least, const Work& work) {
    const auto pieces = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, count / least));
    Failure failure;
    const auto piece = [&](std::int64_t p) { failure.keep([&] { work(count * p / pieces, count * (p + 1) / pieces); }); };
    Threads others;
    std::int64_t started = 1;
    while (started < pieces && others.start([&piece, started] { piece(started); })) ++started;
    piece(0);
    for (; started < pieces; ++started) piece(started);
    others.join();
    failure.rethrow();
}

}  // namespace demix
