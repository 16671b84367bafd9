// Work shared out to torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

namespace forge {

// Run task(i, scratch) for i in [0, count) on torch's threads, each with `floats` of scratch of its own.
// Tasks are taken one by one: on a shared machine the threads do not run at one speed, and equal shares
// would wait for the slowest.
template <typename Task>
void for_each_task(int64_t count, int64_t floats, const Task& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const std::unique_ptr<float[]> scratch(new float[floats]);
    for (int64_t i = next++; i < count; i = next++) task(i, scratch.get());
  };
  if (threads <= 1 || at::in_parallel_region()) return work();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work();
  });
}

template <typename Task>
void for_each_task(int64_t count, const Task& task) {
  for_each_task(count, 0, [&](int64_t i, float*) { task(i); });
}

}  // namespace forge
