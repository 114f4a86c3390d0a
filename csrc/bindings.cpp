// Python bindings of the compiled core: one bind_*() for each room that has native code. Arguments arrive as addresses and
// sizes: megatron_demix/native/ is the only caller and has already checked dtype, contiguity and bounds.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_blend(py::module_& m);
void bind_merge(py::module_& m);
void bind_methods(py::module_& m);

PYBIND11_MODULE(_core, m) {
    m.doc() = "Compiled core of megatron_demix: use it through megatron_demix.native.";
    bind_blend(m);
    bind_merge(m);
    bind_methods(m);
}
