// Weighted sums of K device buffers into M device buffers. A C interface, so that Python loads it with ctypes only where a device is
// present; the arithmetic is in pack_sum.hpp, the cut into launches in launches.hpp.
#include <cuda_runtime.h>

#include <cstdint>

#include "launches.hpp"

namespace {

using namespace demix;

struct DeviceMemory {
    // Each source byte is used by one thread once, so the first-level cache is passed by.
    template <int bytes>
    __device__ static inline void load(const void* from, Pack& to) {
        if constexpr (bytes == 16) {
            const uint4 v = __ldcg(static_cast<const uint4*>(from));
            to.words[0] = v.x, to.words[1] = v.y, to.words[2] = v.z, to.words[3] = v.w;
        } else if constexpr (bytes == 4) {
            to.words[0] = __ldcg(static_cast<const unsigned*>(from));
        } else {
            to.words[0] = __ldcg(static_cast<const unsigned short*>(from));
        }
    }

    // Results are the first to leave the second-level cache: nobody reads them soon, and the sources are read by other groups.
    template <int bytes>
    __device__ static inline void store(void* to, const std::uint32_t* words) {
        if constexpr (bytes >= 16) {
#pragma unroll
            for (int part = 0; part < bytes / 16; ++part)
                __stcs(static_cast<uint4*>(to) + part, make_uint4(words[4 * part], words[4 * part + 1], words[4 * part + 2], words[4 * part + 3]));
        } else if constexpr (bytes == 8) {
            __stcs(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
        } else if constexpr (bytes == 4) {
            __stcs(static_cast<unsigned*>(to), words[0]);
        } else {
            __stcs(static_cast<unsigned short*>(to), static_cast<unsigned short>(words[0]));
        }
    }
};

// Group * width sums and 4 * Tile loaded words are alive at once. With this many blocks a multiprocessor no kernel spills (ptxas -v, for
// sm_80 and sm_90: at most 128 and 80 registers), and two blocks with tiles of 8 have 64 KiB of loads in flight.
constexpr int blocks_that_fit(int group, int width) { return group * width >= 32 ? 2 : 3; }

template <DType In, DType Out, int Group, int Tile>
__global__ void __launch_bounds__(block_threads, blocks_that_fit(Group, pack_width<In>)) weighted_sum(const __grid_constant__ Operands op) {
    thread_work<In, Out, Group, Tile, DeviceMemory>(op, blockIdx.x, gridDim.x, threadIdx.x);
}

struct Stream {
    cudaStream_t stream;

    int copy(void* to, const void* from, std::size_t bytes) { return int(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream)); }
    int zero(void* to, std::size_t bytes) { return int(cudaMemsetAsync(to, 0, bytes, stream)); }
    int launch(const Operands& op, DType in, DType out, int group, int tile, unsigned num_blocks) {
        with_kernel(in, out, group, tile, [&](auto i, auto o, auto g, auto t) {
            weighted_sum<i(), o(), g(), t()><<<num_blocks, block_threads, 0, stream>>>(op);
        });
        return int(cudaGetLastError());
    }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Devices this process can use, or less than 0: what CUDA says against it, as -cudaError_t.
EXPORT int demix_cuda_device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    static_cast<void>(cudaGetLastError());
    return error == cudaSuccess ? count : -int(error);
}

EXPORT const char* demix_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// Whether the current device runs what this library was built for: 0, or the cudaError_t that a launch would end with.
EXPORT int demix_cuda_runs_here() {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaSuccess;
    with_kernel(DType::f32, DType::f32, 1, 1, [&](auto i, auto o, auto g, auto t) {
        error = cudaFuncGetAttributes(&attributes, weighted_sum<i(), o(), g(), t()>);
    });
    (void)cudaGetLastError();  // or the next launch would be blamed for it
    return int(error);
}

// outs[m][i] = round(sum_k weights[m * K + k] * sources[k][i]) on the current device, in `stream`, without waiting.
// sources, outs: device addresses in host arrays, aligned to their items; K <= 64; dtypes as in csrc/dtype.hpp. Returns a
// cudaError_t, 0 for success.
EXPORT int demix_cuda_weighted_sum(const void* const* sources, void* const* outs, const float* weights, int num_sources,
                                   int num_mixtures, std::size_t n, int in, int out, void* stream) {
    if (num_sources < 1 || num_sources > max_sources || num_mixtures < 0 || in < 0 || in > 2 || out < 0 || out > 2)
        return int(cudaErrorInvalidValue);
    if (n == 0) return 0;
    for (int k = 0; k < num_sources; ++k)
        if (reinterpret_cast<std::uintptr_t>(sources[k]) % item_size(DType(in))) return int(cudaErrorInvalidValue);
    for (int m = 0; m < num_mixtures; ++m)
        if (reinterpret_cast<std::uintptr_t>(outs[m]) % item_size(DType(out))) return int(cudaErrorInvalidValue);
    int device = 0, num_processors = 0;
    if (const cudaError_t e = cudaGetDevice(&device)) return int(e);
    if (const cudaError_t e = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device)) return int(e);
    Stream in_stream{static_cast<cudaStream_t>(stream)};
    return launch_all(in_stream, sources, outs, weights, num_sources, num_mixtures, n, DType(in), DType(out),
                      std::size_t(num_processors) * 64);
}
