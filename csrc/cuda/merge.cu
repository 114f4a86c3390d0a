// Weighted sums of K device buffers into M device buffers, bit for bit what csrc/kernels.hpp computes: float32 fused multiply-adds in
// the order of k, one rounding to nearest even, canonical NaN, a weight of exactly 0 left out. A C interface, so that Python loads
// it with ctypes only where a device is present.
//
// Each source is read once for a group of up to 8 mixtures. A thread holds 16 bytes of every operand (8 halves or 4 floats), so
// loads and stores are 128 bits wide; unaligned buffers and the last few elements take the element-wise kernel.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int max_sources = 64, max_group = 8, threads = 256;

enum DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // as in csrc/dtype.hpp

struct Operands {
    const void* sources[max_sources];
    void* outs[max_group];
    float weights[max_group][max_sources];
    int num_sources;
};

template <int T>
__device__ inline float widen(const void* base, std::size_t i) {
    if constexpr (T == f32) return static_cast<const float*>(base)[i];
    const std::uint16_t h = static_cast<const std::uint16_t*>(base)[i];
    if constexpr (T == bf16) return __uint_as_float(std::uint32_t(h) << 16);
    return __half2float(__ushort_as_half(h));
}

template <int T>
__device__ inline void narrow(void* base, std::size_t i, float f) {
    if constexpr (T == f32) {
        static_cast<float*>(base)[i] = f != f ? __uint_as_float(0x7fc00000u) : f;
    } else {
        std::uint16_t h;
        if constexpr (T == bf16) {
            const std::uint32_t u = __float_as_uint(f);
            h = f != f ? 0x7fc0 : std::uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
        } else {
            h = f != f ? 0x7e00 : __half_as_ushort(__float2half_rn(f));
        }
        static_cast<std::uint16_t*>(base)[i] = h;
    }
}

__host__ __device__ constexpr int size_of(int t) { return t == f32 ? 4 : 2; }

// `width` consecutive elements a thread; width * the smaller element size is 16 bytes (or one element, for what is not aligned).
template <int In, int Out, int Group, int Width>
__global__ void __launch_bounds__(threads) weighted_sum(const __grid_constant__ Operands op, std::size_t n) {
    const std::size_t step = std::size_t(gridDim.x) * threads * Width;
    for (std::size_t i = (std::size_t(blockIdx.x) * threads + threadIdx.x) * Width; i < n; i += step) {
        float sums[Group][Width];
        bool any[Group];
#pragma unroll
        for (int m = 0; m < Group; ++m) {
            any[m] = false;
#pragma unroll
            for (int j = 0; j < Width; ++j) sums[m][j] = -0.0f;  // x + (-0) is x for every x, so the first term keeps its sign
        }
#pragma unroll 4
        for (int k = 0; k < op.num_sources; ++k) {
            alignas(16) unsigned char raw[Width * size_of(In)];
            const char* from = static_cast<const char*>(op.sources[k]) + i * size_of(In);
            if constexpr (Width > 1) {
#pragma unroll
                for (int part = 0; part < int(sizeof(raw)) / 16; ++part)
                    reinterpret_cast<uint4*>(raw)[part] = __ldcs(reinterpret_cast<const uint4*>(from) + part);
            } else {
#pragma unroll
                for (int byte = 0; byte < int(sizeof(raw)); ++byte) raw[byte] = from[byte];
            }
#pragma unroll
            for (int m = 0; m < Group; ++m) {
                const float w = op.weights[m][k];
                if (w == 0.0f) continue;  // the same for the whole grid
                any[m] = true;
#pragma unroll
                for (int j = 0; j < Width; ++j) sums[m][j] = __fmaf_rn(w, widen<In>(raw, j), sums[m][j]);
            }
        }
#pragma unroll
        for (int m = 0; m < Group; ++m) {
            alignas(16) unsigned char raw[Width * size_of(Out)];
#pragma unroll
            for (int j = 0; j < Width; ++j) narrow<Out>(raw, j, any[m] ? sums[m][j] : 0.0f);
            char* to = static_cast<char*>(op.outs[m]) + i * size_of(Out);
            if constexpr (Width > 1) {
#pragma unroll
                for (int part = 0; part < int(sizeof(raw)) / 16; ++part)
                    __stcs(reinterpret_cast<uint4*>(to) + part, reinterpret_cast<uint4*>(raw)[part]);
            } else {
#pragma unroll
                for (int byte = 0; byte < int(sizeof(raw)); ++byte) to[byte] = raw[byte];
            }
        }
    }
}

template <int In, int Out, int Group, int Width>
void launch_width(const Operands& op, std::size_t n, int num_processors, cudaStream_t stream) {
    const std::size_t blocks = (n / Width + threads - 1) / threads, most = std::size_t(num_processors) * 32;
    weighted_sum<In, Out, Group, Width><<<unsigned(blocks < most ? blocks : most), threads, 0, stream>>>(op, n);
}

template <int In, int Out, int Group>
void launch(Operands op, std::size_t n, int num_processors, cudaStream_t stream) {
    constexpr int width = 16 / (size_of(In) < size_of(Out) ? size_of(In) : size_of(Out));
    bool aligned = true;
    for (int k = 0; k < op.num_sources; ++k) aligned = aligned && reinterpret_cast<std::uintptr_t>(op.sources[k]) % 16 == 0;
    for (int m = 0; m < Group; ++m) aligned = aligned && reinterpret_cast<std::uintptr_t>(op.outs[m]) % 16 == 0;
    const std::size_t wide = aligned ? n / width * width : 0;
    if (wide) launch_width<In, Out, Group, width>(op, wide, num_processors, stream);
    if (wide == n) return;
    for (int k = 0; k < op.num_sources; ++k) op.sources[k] = static_cast<const char*>(op.sources[k]) + wide * size_of(In);
    for (int m = 0; m < Group; ++m) op.outs[m] = static_cast<char*>(op.outs[m]) + wide * size_of(Out);
    launch_width<In, Out, Group, 1>(op, n - wide, num_processors, stream);
}

using Launch = void (*)(Operands, std::size_t, int, cudaStream_t);

template <int In, int Out>
Launch by_group(int group) {
    return group == 8 ? launch<In, Out, 8> : group == 4 ? launch<In, Out, 4> : group == 2 ? launch<In, Out, 2> : launch<In, Out, 1>;
}

Launch choose(int in, int out, int group) {
    switch (in * 3 + out) {
        case 0: return by_group<f32, f32>(group);
        case 1: return by_group<f32, bf16>(group);
        case 2: return by_group<f32, f16>(group);
        case 3: return by_group<bf16, f32>(group);
        case 4: return by_group<bf16, bf16>(group);
        case 5: return by_group<bf16, f16>(group);
        case 6: return by_group<f16, f32>(group);
        case 7: return by_group<f16, bf16>(group);
        default: return by_group<f16, f16>(group);
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Devices this process can use; 0 where there is no driver.
EXPORT int demix_cuda_device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

EXPORT const char* demix_cuda_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// outs[m][i] = round(sum_k weights[m * K + k] * sources[k][i]) on the current device, in `stream`, without waiting.
// sources, outs: device addresses in host arrays; K <= 64; dtypes as DType above. Returns a cudaError_t, 0 for success.
EXPORT int demix_cuda_weighted_sum(const void* const* sources, void* const* outs, const float* weights, int num_sources,
                                   int num_mixtures, std::size_t n, int in, int out, void* stream) {
    if (num_sources < 1 || num_sources > max_sources || num_mixtures < 0 || in < 0 || in > 2 || out < 0 || out > 2)
        return int(cudaErrorInvalidValue);
    if (n == 0) return 0;
    int device = 0, num_processors = 0;
    if (const cudaError_t e = cudaGetDevice(&device)) return int(e);
    if (const cudaError_t e = cudaDeviceGetAttribute(&num_processors, cudaDevAttrMultiProcessorCount, device)) return int(e);
    const cudaStream_t in_stream = static_cast<cudaStream_t>(stream);
    Operands op{};
    op.num_sources = num_sources;
    for (int k = 0; k < num_sources; ++k) op.sources[k] = sources[k];
    int pending[max_group], num_pending = 0;
    const auto flush = [&] {
        int done = 0;
        while (done < num_pending) {
            int group = max_group;
            while (group > num_pending - done) group /= 2;
            for (int g = 0; g < group; ++g) {
                const int m = pending[done + g];
                op.outs[g] = outs[m];
                for (int k = 0; k < num_sources; ++k) op.weights[g][k] = weights[std::size_t(m) * num_sources + k];
            }
            choose(in, out, group)(op, n, num_processors, in_stream);
            done += group;
        }
        num_pending = 0;
    };
    for (int m = 0; m < num_mixtures; ++m) {
        int used = 0, last = 0;
        for (int k = 0; k < num_sources; ++k)
            if (weights[std::size_t(m) * num_sources + k] != 0.0f) ++used, last = k;
        // A lone weight of 1 copies bits, as on the CPU: NaNs keep their payload.
        if (used == 1 && in == out && weights[std::size_t(m) * num_sources + last] == 1.0f) {
            const std::size_t bytes = n * std::size_t(size_of(in));
            if (const cudaError_t e = cudaMemcpyAsync(outs[m], sources[last], bytes, cudaMemcpyDeviceToDevice, in_stream)) return int(e);
            continue;
        }
        pending[num_pending++] = m;
        if (num_pending == max_group) flush();
    }
    flush();
    return int(cudaGetLastError());
}
