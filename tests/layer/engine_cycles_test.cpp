// SPDX-License-Identifier: Apache-2.0
#include <unistd.h>

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>

#include "sida/io/checkpoint_store.hpp"
#include "sida/io/safetensors_writer.hpp"
#include "support/catch.hpp"
#include "support/layers.hpp"
#include "support/temporary_folder.hpp"

using namespace sida;
using namespace sida::test;

namespace {

struct Held {
  std::ptrdiff_t threads, files, bytes;
};

std::ptrdiff_t entries(const char* folder) {
  return std::distance(std::filesystem::directory_iterator(folder), {});
}

Held held_now() {
  std::ifstream statm("/proc/self/statm");
  std::ptrdiff_t all = 0, resident = 0;
  statm >> all >> resident;
  return {entries("/proc/self/task"), entries("/proc/self/fd"), resident * ::sysconf(_SC_PAGESIZE)};
}

}  // namespace

TEST_CASE("Opening, running and closing ten thousand times leaves nothing behind",
          "[layer][cycles]") {
  MoeConfig config;
  config.layers = 1;
  config.experts = 2;
  config.hidden_size = config.intermediate_size = 8;
  const Model model(config);
  const TemporaryFolder folder;
  const SlabLayout layout(config);
  std::vector<SafetensorsEntry> tensors;
  for (int expert = 0; expert < 2; ++expert) {
    const std::byte* const slab = model.slabs[0][static_cast<std::size_t>(expert)].data();
    const std::string prefix = "mlp.experts.expert_" + std::to_string(expert);
    tensors.push_back(
        {prefix + ".wi.weight", DataType::f32, {8, 8}, {slab + layout.up_offset, 256}});
    tensors.push_back(
        {prefix + ".wo.weight", DataType::f32, {8, 8}, {slab + layout.down_offset, 256}});
  }
  write_safetensors(folder / "model.safetensors", tensors);
  Default whole(model, Budget::fraction(1));
  const auto expected = whole.pass();
  const HashTable table = whole.scheduler->recorder().table();

  const auto cycle = [&](int i) {
    CheckpointStore::Options options;
    options.config = config;
    const auto store =
        std::make_shared<CheckpointStore>(Checkpoint::open(folder / "model.safetensors"), options);
    Default engine(model, Budget::experts(1 + i % 2), store);
    engine.scheduler->start([&]() -> std::optional<HashTable> { return table; }, 2);
    engine.scheduler->next_batch();
    if (i % 3) REQUIRE(engine.rest_of_pass() == expected);
    if (i % 2) engine.scheduler->close();
  };
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  constexpr int cycles = 1000;  // sanitizers keep memory of their own
  constexpr std::ptrdiff_t slack = 256 << 20;
#else
  constexpr int cycles = 10000;
  constexpr std::ptrdiff_t slack = 2 << 20;  // of a cycle's some 100 KiB, not 20 times as much
#endif
  for (int i = 0; i < cycles / 10; ++i) cycle(i);
  const Held before = held_now();
  for (int i = 0; i < cycles; ++i) cycle(i);
  const Held after = held_now();
  CHECK(after.threads == before.threads);
  CHECK(after.files == before.files);
  CHECK(after.bytes <= before.bytes + slack);
}
