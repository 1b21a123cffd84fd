// What Python may ask of the build. Importing the module also registers the operators of ops.cpp.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of fino_fast: build information; the operators are torch.ops.fino.*";
  m.def("capability", [] { return fino::capability(); },
        "Instruction-set level in use; FINO_CPU_CAPABILITY forces one.");
  m.def("capabilities", &fino::capabilities,
        "Instruction-set levels of this binary that this processor runs, lowest first.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["levels"] = fino::capabilities();
    return info;
  }, "Compiler and levels of this build.");
}
