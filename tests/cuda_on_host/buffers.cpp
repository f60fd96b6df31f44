// Which buffer an address lies in, and what is wrong with an access.
#include "launch.h"  // declares Grid and includes emulator.h

namespace pruned_ops::cuda::emulator {

void fail_access(const Buffer* buffer, uintptr_t address, size_t item, size_t bytes, size_t alignment,
                 Access kind) {
  const char* const verbs[] = {"reads ", "writes ", "reads or writes "};
  const std::string access = verbs[static_cast<int>(kind)] + std::to_string(bytes) + " bytes ";
  if (!buffer) fail(access + "through a null pointer");
  const int64_t offset = static_cast<int64_t>(address - buffer->begin);
  const std::string index =
      "index " + std::to_string(offset / static_cast<int64_t>(item)) + " of " + buffer->name;
  if (offset < 0 || offset + bytes > buffer->bytes)
    fail(access + "at " + index + ", which has " + std::to_string(buffer->bytes / item));
  if (address % alignment != 0)
    fail(access + "at " + index + ", which is not aligned to " + std::to_string(alignment) + " bytes");
  fail(access + "at " + index + ", which is read-only");
}

const Buffer* find_buffer(uintptr_t address, bool writes) {
  const Buffer* found = nullptr;
  int best = 0;
  for (const Buffer& buffer : settings().buffers) {
    if (address < buffer.begin || address > buffer.begin + buffer.bytes) continue;
    const bool inside = address < buffer.begin + buffer.bytes;
    const int rank = 1 + (address == buffer.begin) + 2 * inside + 4 * (writes && buffer.writable);
    if (rank > best) {
      best = rank;
      found = &buffer;
    }
  }
  if (!found) fail("a pointer to memory that is none of the kernel's buffers");
  return found;
}

}  // namespace pruned_ops::cuda::emulator
