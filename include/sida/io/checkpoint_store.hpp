// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sida/cache/expert_store.hpp"
#include "sida/cache/slab_parts.hpp"
#include "sida/core/expert_id.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/io/checkpoint.hpp"
#include "sida/io/checkpoint_experts.hpp"
#include "sida/io/slab_source.hpp"

namespace sida {

/// The experts of a checkpoint, read from its files slab by slab, whatever their layout there.
///
/// Tensors that the files hold as the slab wants them are read straight into the destination, by as
/// many threads at once as call. Others are transposed or converted on the way, through one buffer
/// of staging_bytes() at which readers take turns. Nothing is mapped and no weight is kept.
class CheckpointStore : public ExpertStore {
 public:
  using Options = ExpertSearch;

  /// @throws InvalidArgument as find_experts does.
  explicit CheckpointStore(std::shared_ptr<const Checkpoint> checkpoint,
                           const Options& options = {})
      : CheckpointStore(checkpoint, find_experts(*checkpoint, options)) {}

  /// Over experts that find_experts found in this checkpoint.
  CheckpointStore(std::shared_ptr<const Checkpoint> checkpoint, const CheckpointExperts& experts)
      : checkpoint_(std::move(checkpoint)),
        config_(experts.config),
        layer_names_(experts.layer_names),
        slab_bytes_(SlabLayout(config_).slab_bytes) {
    const SlabLayout layout(config_);
    bool plain = true;
    sources_.reserve(experts.tensors.size());
    for (const std::vector<ExpertTensor>& expert : experts.tensors) {
      std::vector<SlabSource>& sources = sources_.emplace_back();
      for (const ExpertTensor& tensor : expert) {
        sources.push_back(place_in_slab(layout, config_.dtype, tensor));
        plain = plain && is_plain(tensor, config_.dtype);
      }
      std::sort(sources.begin(), sources.end(), [](const SlabSource& a, const SlabSource& b) {
        return a.slab_offset < b.slab_offset;
      });
    }
    if (!plain)
      converter_ =
          std::make_unique<ConvertingReader>(config_.dtype, std::min(slab_bytes_, largest_buffer));
  }

  /// Opens the checkpoint at `path` (see Checkpoint::open). @throws IoError, InvalidArgument.
  static std::shared_ptr<CheckpointStore> open(const std::filesystem::path& path,
                                               const Options& options = {}) {
    return std::make_shared<CheckpointStore>(Checkpoint::open(path), options);
  }

  const MoeConfig& config() const noexcept { return config_; }
  /// The modules around `experts`, by layer.
  const std::vector<std::string>& layer_names() const noexcept { return layer_names_; }

  std::int32_t layers() const noexcept override { return config_.layers; }
  std::int32_t experts() const noexcept override { return config_.experts; }
  std::size_t slab_bytes() const noexcept override { return slab_bytes_; }
  std::size_t staging_bytes() const noexcept override {
    return converter_ ? converter_->buffer_bytes() : 0;
  }

  void read(ExpertId id, std::size_t offset, std::span<std::byte> destination) override {
    check_read(*this, id, offset, destination.size());
    const std::vector<SlabSource>& sources = sources_[index_of(id, config_.experts)];
    announce(sources, offset, 2 * destination.size());
    read_parts(std::span<const SlabSource>(sources), offset, destination,
               [this](const SlabSource& source, std::size_t begin, std::span<std::byte> bytes) {
                 if (is_plain(source.tensor, config_.dtype)) {
                   source.tensor.file->read(source.tensor.begin + begin, bytes);
                 } else {
                   converter_->read(source.tensor, begin, bytes);
                 }
               });
  }

 private:
  /// Lets the kernel bring the range of a slab, as far as the slab goes, while it copies: reading
  /// chunk after chunk then keeps the disk busy.
  void announce(const std::vector<SlabSource>& sources, std::size_t offset,
                std::size_t bytes) const noexcept {
    for (const SlabSource& source : sources) {
      const std::size_t begin = std::max(offset, source.slab_offset);
      const std::size_t end = std::min(offset + bytes, source.slab_offset + source.bytes);
      if (begin >= end || !is_plain(source.tensor, config_.dtype)) continue;
      source.tensor.file->will_read(source.tensor.begin + (begin - source.slab_offset),
                                    end - begin);
    }
  }

  /// Large enough that the runs read for a transposition are long, small beside most slabs.
  static constexpr std::size_t largest_buffer = std::size_t{4} << 20;

  std::shared_ptr<const Checkpoint> checkpoint_;
  MoeConfig config_;
  std::vector<std::string> layer_names_;
  std::size_t slab_bytes_;
  std::vector<std::vector<SlabSource>> sources_;  ///< of expert [layer * experts + expert]
  std::unique_ptr<ConvertingReader> converter_;   ///< only if there is something to convert
};

}  // namespace sida
