// Lets torch, built without CUDA, switch to the one pretended device: indexing does, even where nothing runs.

#undef TORCH_TARGET_VERSION  // guards are not part of the stable ABI

#include <c10/core/impl/FakeGuardImpl.h>

namespace {

C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)

}  // namespace
