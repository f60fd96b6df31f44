// Small kernels that test the emulator, each with what it needs to show; planted.cu.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace pruned_ops::cuda::planted {

// Pointers to the buffers and numbers as each kernel says; returns what its launch was refused for.
using Host = const char* (*)(void* const* pointers, const int64_t* numbers);
const std::map<std::string, Host>& kernels();

}  // namespace pruned_ops::cuda::planted
