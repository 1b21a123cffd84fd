// What Python may ask of the build. Importing the module also registers the operators of csrc/ops.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <optional>

#include "cpu/capability.h"
#include "cpu/scratch.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of fino_fast: build information; the operators are torch.ops.fino.*";
  m.def("capability", [] { return fino::capability(); },
        "Instruction-set level in use; FINO_CPU_CAPABILITY forces one.");
  m.def("capabilities", &fino::capabilities,
        "Instruction-set levels of this binary that this processor runs, lowest first.");
  m.def("choose_bf16_products",
        [](std::optional<bool> always) {
          fino::choose_bf16_products(!always   ? fino::Bf16Products::by_level
                                     : *always ? fino::Bf16Products::always
                                               : fino::Bf16Products::never);
        },
        py::arg("always"),
        "Multiply bf16 rows as they are (True), in fp32 (False), or as bf16 where the processor has "
        "instructions for it and they pay (None, the default). Sums are in fp32 in any case.");
  m.def("release_scratch", &fino::release_scratch,
        "Hand to the system what the CPU kernels keep of their working memory from call to call (at most "
        "96 MB a process); returns its bytes. The next call asks for new memory.");
  m.def("loop_threads", [] {
    std::atomic<int> threads{0};
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { ++threads; });
    return threads.load();
  }, "Threads that share a loop of this build: torch.get_num_threads(), or 1 where it has no OpenMP.");
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["levels"] = fino::capabilities();
    return info;
  }, "Compiler and levels of this build.");
}
