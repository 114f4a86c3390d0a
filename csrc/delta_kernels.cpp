#include "delta_kernels.hpp"

#include "kernels.hpp"

namespace demix {
namespace {

namespace scalar {
#define TARGET
#include "delta_loops.hpp"
#undef TARGET
}  // namespace scalar

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "delta_loops.hpp"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,fma,f16c")))
#include "delta_loops.hpp"
#undef TARGET
}  // namespace avx512
#endif

}  // namespace

const DeltaKernels& delta_kernels(const std::string& isa) {
    const std::string found = kernels(isa).isa;
#if defined(__x86_64__)
    if (found == "avx512" || found == "avx512bf16") return avx512::table;
    if (found == "avx2") return avx2::table;
#endif
    return scalar::table;
}

}  // namespace demix
