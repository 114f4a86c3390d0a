// Python bindings of the compiled core, all of them in this file. Arguments arrive as addresses and sizes: megatron_demix/native.py
// is the only caller and has already checked dtype, contiguity and bounds.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_core, m) { m.doc() = "Compiled core of megatron_demix: use it through megatron_demix.native."; }
