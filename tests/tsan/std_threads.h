// at::parallel_for on threads of the standard library, for `make tsan`: ThreadSanitizer sees these begin and
// end, and does not see into the OpenMP runtime that torch brings. Included before all else in that build.
//
// ATen's own header defines at::internal::invoke_parallel for OpenMP, and nothing where there is none. This
// stands in its place. PRUNED_OPS_PLANT_RACE in the environment adds a race, which the sanitizer has to find.
#pragma once

#include <cstdint>

#define INTRA_OP_PARALLEL

namespace at::internal {
template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f);
}  // namespace at::internal

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

namespace at::internal {

inline int64_t planted = 0;

template <typename F>
void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t number = at::get_num_threads();
  if (grain_size > 0) number = std::min(number, at::divup(end - begin, grain_size));
  const int64_t share = at::divup(end - begin, number);
  std::vector<std::exception_ptr> errors(number);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < number; ++i) {
    threads.emplace_back([&, i] {
      const int64_t first = begin + i * share;
      if (first >= end) return;
      if (std::getenv("PRUNED_OPS_PLANT_RACE") != nullptr) ++planted;
      try {
        const ThreadIdGuard guard(static_cast<int>(i));
        f(first, std::min(end, first + share));
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace at::internal
