// The Python module for host code without torch. Today it only tells how the extension was built; ADR-0010 says why it
// is kept and what may join it.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

std::string torch_target_version() {
  // Major, minor and patch are in the top three bytes.
  constexpr std::uint64_t version = TRIMSERVE_TORCH_TARGET_VERSION;
  return std::to_string(version >> 56) + "." + std::to_string((version >> 48) & 0xff);
}

py::list cuda_architectures() {
  std::istringstream names(TRIMSERVE_CUDA_ARCHITECTURES);
  py::list architectures;
  for (std::string name; names >> name;) architectures.append(name);
  return architectures;
}

py::dict build_info() {
  const std::string git_sha = TRIMSERVE_GIT_SHA;
  py::dict info;
  info["version"] = TRIMSERVE_VERSION;
  info["compiler"] = TRIMSERVE_COMPILER;
  info["build_type"] = TRIMSERVE_BUILD_TYPE;
  info["torch_target_version"] = torch_target_version();
  info["cuda_architectures"] = cuda_architectures();
  info["git_sha"] = git_sha.empty() ? py::object(py::none()) : py::object(py::str(git_sha));
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host code of trimserve without torch.";
  m.def("build_info", &build_info, "How the extension was built, as a dict of plain values.");
}
