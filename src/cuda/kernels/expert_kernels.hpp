// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

/// The expert kernels: `out[t] = Σ_j weights[t, j] * expert(ids[t, j])(hidden[t])` on a GPU, as
/// make_plan(), compute_experts() for the experts that are resident (in any number of calls), then
/// combine(); or, of few assignments, compute_few(). Every function only enqueues work on a stream,
/// reads nothing back, and can be captured into a CUDA graph. Pointers are to memory of the
/// stream's device unless said otherwise.
namespace sida::cuda {

using Stream = CUstream_st*;  ///< a cudaStream_t

enum class Dtype : std::uint8_t { f32, f16, bf16 };
/// The clamped ones are for gated experts: with g = min(gate, limit) and u = clamp(up, -limit,
/// limit), silu_clamped is u * g * sigmoid(g), swiglu_clamped (u + 1) * g * sigmoid(1.702 * g).
enum class Act : std::uint8_t { relu, relu2, gelu, gelu_tanh, silu, silu_clamped, swiglu_clamped };
constexpr float swiglu_alpha = 1.702f;

/// How the two matrix products of an expert are computed.
enum class Kernel : std::uint8_t {
  tuned,    ///< what the table of choose_kernel.cpp says
  narrow,   ///< mma.sync on streamed weights, 16 weight rows and 8 tokens at a time
  wide,     ///< the same with 32 weight rows and 32 tokens at a time
  grouped,  ///< tiles of 128 rows x 128 weight rows, mma.sync
  swapped,  ///< tiles of 128 weight rows x up to 128 rows, wgmma and tensor copies
  hopper,   ///< tiles of 128 rows x 256 weight rows, wgmma and tensor copies
  dot,      ///< f32 weights: a warp for each weight row
  tiled,    ///< f32 weights: tiles of 128 rows x 128 weight rows
  general,  ///< plain f32 arithmetic: any dtype, any size
};

/// The most choices a token, and experts a layer, that the kernels take.
constexpr int max_top_k = 16;
constexpr int max_experts = 512;

/// What the experts of a layer share, and the size of one call.
struct LayerShape {
  Dtype dtype = Dtype::f32;  ///< of hidden states, weights, biases and the result
  int tokens = 0;            ///< T, 0 or more
  int top_k = 1;             ///< k, 1 to max_top_k
  int experts = 1;           ///< E, 1 to max_experts
  int hidden = 1;            ///< H
  int intermediate = 1;      ///< I
  Act activation = Act::relu;
  bool gated = false;
  bool up_bias = false;
  bool down_bias = false;
  float limit = 7.0f;             ///< of the clamped activations
  Kernel kernel = Kernel::tuned;  ///< another forces it where it takes the shape
};

/// The experts that hold rows, ascending; one entry each.
struct ActiveExpert {
  std::int32_t expert, row_begin, rows, unused;
};

/// A call's assignments a = t * k + j grouped by expert. Lies in memory of the caller's.
struct Plan {
  ActiveExpert* active;        ///< [min(E, T * k)]
  std::int32_t* active_count;  ///< [1]
  std::int32_t* invalid;       ///< [1] ids that were neither an expert nor the sentinel E
  std::int32_t* order;         ///< [T * k] row -> assignment, ascending within an expert
  std::int32_t* row_of;        ///< [T * k] assignment -> row, or -1 if left out
  std::int32_t* group_rows;    ///< [T * k] assignment -> rows of its expert
  std::int32_t* taken_tiles;   ///< [2] zeros, but while a product is computed
  std::int32_t* counts;        ///< [E] scratch of make_plan()
  std::int32_t* chunks;        ///< scratch of make_plan(), last of the plan
};

/// Bytes that a plan of this shape takes.
std::size_t plan_bytes(const LayerShape& shape);

/// The plan that lies at `memory`, which holds plan_bytes() and is aligned to 16 bytes.
Plan plan_at(const LayerShape& shape, std::byte* memory);

/// Experts' weights: the slab of expert e begins at `arena + slot_of[e] * stride`; slot_of[e] == -1
/// means absent. Inside a slab lie [I, H] (with gate [2I, H], the gate's rows first), [H, I] and
/// the biases, at byte offsets that are multiples of 16, as is `stride`.
struct ExpertSlabs {
  const std::byte* arena = nullptr;
  std::size_t stride = 0;
  const std::int32_t* slot_of = nullptr;  ///< [E]; or null, where FewSlots says it
  std::size_t up_offset = 0, down_offset = 0, up_bias_offset = 0, down_bias_offset = 0;
};

/// Assignments up to which a call may be one of few: one for each lane of a warp.
constexpr int few_assignments = 32;

/// The slots of the active experts of a call that is_few(), in their order, or -1: told with a
/// launch, so that none need be brought to the device before it.
struct FewSlots {
  std::int32_t of[few_assignments] = {};
};

/// Bytes of scratch memory of one call, aligned to 16 bytes: intermediate activations and each
/// row's result, in f32 or, where experts have many rows, in the dtype.
std::size_t workspace_bytes(const LayerShape& shape);

/// A call's routing as the caller has it. On the device.
struct GivenRouting {
  const void* ids = nullptr;  ///< [T, k] i32, or i64 with `wide_ids`
  bool wide_ids = false;
  const void* weights = nullptr;  ///< [T, k]
  Dtype weights_type = Dtype::f32;
  const std::uint8_t* keep = nullptr;  ///< [T] 0: leave the token out; or null
};

/// The routing in one form: for the other kernels, and for the host, which reads pinned memory.
/// Either pair may be null.
struct TakenRouting {
  std::int32_t* ids = nullptr;       ///< [T, k], ids beyond 32 bits as the largest or smallest
  float* weights = nullptr;          ///< [T, k], 0 where a token is left out
  std::int32_t* host_ids = nullptr;  ///< [T, k], `left_out` where a choice is
  float* host_weights = nullptr;     ///< [T, k], 0 where a choice is left out
};
constexpr std::int32_t left_out = -0x7fffffff - 1;

/// Brings a call's routing into one form, and groups its assignments by expert: stable, the same on
/// every run. Left out are those whose weight is 0 or whose token is, those with id E (the
/// sentinel), and those with any other id outside [0, E), which are counted in `plan.invalid` and
/// touch no memory. Without `taken.ids` ids are to be i32 and weights f32, and no token left out.
/// @throws std::invalid_argument for k or E out of range or missing memory, std::runtime_error if a
/// launch fails.
void make_plan(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
               const Plan& plan, Stream stream);

/// Computes the plan's rows of every expert that is present in `slabs`, into `workspace`.
///
/// hidden: [T, H], aligned to 16 bytes. An element of the result depends on dtype, shape and the
/// rows of its expert in the plan, never on which experts one call computes.
/// @throws as make_plan().
void compute_experts(const LayerShape& shape, const Plan& plan, const void* hidden,
                     const ExpertSlabs& slabs, std::byte* workspace, Stream stream,
                     const FewSlots& few = {});

/// Writes out[t] = Σ_j weights[t, j] * result(t, j), summed in f32 in the order of j, rounded once.
/// Tokens without an assignment get 0. Every expert of the plan must have been computed.
///
/// weights: [T, k] f32; out: [T, H] of the shape's dtype.
/// @throws as make_plan().
void combine(const LayerShape& shape, const Plan& plan, const float* weights,
             const std::byte* workspace, void* out, Stream stream);

/// Whether compute_few() computes this shape, on the current device.
bool is_few(const LayerShape& shape);

/// Bytes of memory that compute_few() counts finished blocks in: zeros before the first call, and
/// again after each.
std::size_t few_bytes(const LayerShape& shape);

/// A whole call in two launches, all of whose experts are present in `slabs`: make_plan(),
/// compute_experts() and combine() with the same bits. `taken.host_ids` are written, `taken.ids`
/// not. `counters` holds few_bytes(); calls that share it are enqueued in one order.
/// @throws as make_plan().
void compute_few(const LayerShape& shape, const GivenRouting& given, const TakenRouting& taken,
                 const void* hidden, const ExpertSlabs& slabs, std::byte* workspace,
                 std::byte* counters, void* out, Stream stream, const FewSlots& few = {});

}  // namespace sida::cuda
