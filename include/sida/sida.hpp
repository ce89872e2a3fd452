// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything but files (sida/io.hpp), in the order in which data flow through it.
#include "sida/version.hpp"

#include "sida/core/data_type.hpp"
#include "sida/core/error.hpp"
#include "sida/core/expert_id.hpp"
#include "sida/core/moe_config.hpp"
#include "sida/core/processors.hpp"
#include "sida/core/tensor_view.hpp"
#include "sida/core/thread.hpp"

#include "sida/backend/backend.hpp"
#include "sida/backend/buffer.hpp"
#include "sida/backend/cpu_backend.hpp"

#include "sida/hash/batch_key.hpp"
#include "sida/hash/hash_predictor.hpp"
#include "sida/hash/hash_predictor_cpu.hpp"
#include "sida/hash/hash_table.hpp"
#include "sida/hash/predictor_weights.hpp"

#include "sida/schedule/offload_plan.hpp"
#include "sida/schedule/offload_scheduler.hpp"
#include "sida/schedule/replay.hpp"
#include "sida/schedule/router_look_ahead.hpp"
#include "sida/schedule/run_times.hpp"

#include "sida/cache/array_store.hpp"
#include "sida/cache/budget.hpp"
#include "sida/cache/cache_stats.hpp"
#include "sida/cache/eviction_policy.hpp"
#include "sida/cache/expert_cache.hpp"
#include "sida/cache/expert_store.hpp"
#include "sida/cache/fifo_policy.hpp"
#include "sida/cache/lfu_policy.hpp"
#include "sida/cache/look_ahead_policy.hpp"
#include "sida/cache/lru_policy.hpp"
#include "sida/cache/read_ring.hpp"
#include "sida/cache/throttled_store.hpp"

#include "sida/ffn/expert_ffn.hpp"
#include "sida/ffn/expert_ffn_cpu.hpp"
#include "sida/ffn/routed_call.hpp"
#include "sida/ffn/routed_call_cpu.hpp"
#include "sida/ffn/slab_layout.hpp"
#include "sida/ffn/token_groups.hpp"

#include "sida/layer/offloaded_experts.hpp"
#include "sida/layer/router_choices.hpp"
