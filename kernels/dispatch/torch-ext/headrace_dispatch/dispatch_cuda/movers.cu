// Tokens to their experts and back between the GPUs of one node, over NVLink, through buffers that all of them map.
//
//   push   every rank writes its tokens' rows into the buffers of the ranks that hold their experts: a row once per
//          rank, however many of its experts are there
//   pull   every rank reads, for each of its tokens, one result from each of those ranks and adds them up, in the
//          order of the ranks and in FP32: the same sum on every run
//
// A token has the same slot, (source rank, token), in every buffer. So nobody has to know how much the others send, and
// no counts are exchanged first; the price is room for the worst case.
//
// Who may touch what when (epochs count upwards, one for each push or signal of a rank):
//   push | wait      received rows are complete   -> experts run, write their results
//   signal | wait    results are complete         -> pull; and received rows may be overwritten, by the next push
//   push | wait ...  results may be overwritten: whoever has pushed again has pulled before, in stream order
//
// Waiting is a kernel of its own, so it never keeps senders from running, and what push and pull read is not written
// while they run. That matters for the loads: DeepSeek's cache hints (report, arXiv 2412.19437, section 3.2.2; DeepEP)
//   ld.global.nc.L1::no_allocate.L2::256B
// read through the non-coherent path, which PTX leaves undefined for memory that changes during the kernel; DeepEP
// uses them on such memory and says so. They keep streaming data out of L1 and fetch 256 bytes into L2. Compile with
// -DHEADRACE_PLAIN_LOADS for coherent loads instead.
//
// Warps are specialised: all but the last of a block move rows; the last moves what belongs to the rows but is small
// and scattered (experts and weights), so that the row warps' loop stays straight. The number of blocks is the number
// of SMs given up to communication.
//
// Not here: other nodes (no RDMA), FP8 on the way back (the report combines in BF16).

#include "movers.h"

#include <cuda_bf16.h>

#include <cstdio>

namespace headrace {
namespace {

constexpr int kWarps = 16;
constexpr int kRowWarps = kWarps - 1;
constexpr int kUnroll = 4;  // pieces of 16 bytes that a thread has on the way at once

__device__ __forceinline__ int4 load_piece(const int4* address) {
  int4 piece;
#ifdef HEADRACE_PLAIN_LOADS
  asm volatile("ld.relaxed.sys.global.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(address));
#else
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "l"(address));
#endif
  return piece;
}

__device__ __forceinline__ float load_float(const float* address) {
  float value;
#ifdef HEADRACE_PLAIN_LOADS
  asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
#else
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.f32 %0, [%1];" : "=f"(value) : "l"(address));
#endif
  return value;
}

__device__ __forceinline__ void store_piece(int4* address, const int4& piece) {
  asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(piece.x), "r"(piece.y),
               "r"(piece.z), "r"(piece.w)
               : "memory");
}

__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ unsigned count_finished(unsigned* address) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(address) : "memory");
  return before;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

template <typename T>
__device__ __forceinline__ T* region(const Peers& peers, int rank, int64_t offset) {
  return reinterpret_cast<T*>(peers.buffer[rank] + offset);
}

// Bit r: rank r holds one of the token's experts. The whole warp asks at once.
__device__ __forceinline__ unsigned ranks_of(const Choices& choices, int token, int lane) {
  unsigned bit = 0;
  if (lane < choices.chosen) {
    const int expert = choices.experts[int64_t(token) * choices.chosen + lane];
    if (expert >= 0) bit = 1u << (expert / choices.experts_per_rank);
  }
  return __reduce_or_sync(~0u, bit);
}

// One row of `pieces` times 16 bytes from `source` to its slot on each of `ranks`: read once, written to all. Ranks
// begin with their right-hand neighbour, so that they do not all write to the same one.
__device__ __forceinline__ void send_row(const Peers& peers, unsigned ranks, int64_t offset, int64_t slot,
                                         const int4* source, int pieces, int lane) {
  for (int first = lane; first < pieces; first += 32 * kUnroll) {
    int4 piece[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
      if (first + 32 * u < pieces) piece[u] = load_piece(source + first + 32 * u);
    for (int step = 1; step <= peers.ranks; ++step) {
      const int rank = (peers.rank + step) % peers.ranks;
      if (!(ranks >> rank & 1)) continue;
      int4* target = region<int4>(peers, rank, offset) + slot * pieces + first;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
        if (first + 32 * u < pieces) store_piece(target + 32 * u, piece[u]);
    }
  }
}

// Experts and weights of all slots of this rank, to every rank; slots without a token say so.
__device__ __forceinline__ void send_choices(const Peers& peers, const Regions& at, const Choices& choices,
                                             const float* weights, int lane) {
  const int used = choices.tokens * choices.chosen, all = choices.capacity * choices.chosen;
  for (int i = blockIdx.x * 32 + lane; i < all; i += gridDim.x * 32) {
    const int expert = i < used ? choices.experts[i] : -1;
    const float weight = i < used ? weights[i] : 0.0f;
    for (int rank = 0; rank < peers.ranks; ++rank) {
      region<int32_t>(peers, rank, at.experts)[int64_t(peers.rank) * all + i] = expert;
      region<float>(peers, rank, at.weights)[int64_t(peers.rank) * all + i] = weight;
    }
  }
}

__device__ __forceinline__ void announce(const Peers& peers, const Regions& at, int rank, uint64_t epoch) {
  store_release(region<uint64_t>(peers, rank, at.arrived) + peers.rank, epoch);
}

__global__ void __launch_bounds__(kWarps * 32, 1)
    push_kernel(const __grid_constant__ Peers peers, const __grid_constant__ Regions at,
                const __grid_constant__ Choices choices, const __grid_constant__ Payload payload, uint64_t epoch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < kRowWarps) {
    for (int token = blockIdx.x * kRowWarps + warp; token < choices.tokens; token += gridDim.x * kRowWarps) {
      const unsigned ranks = ranks_of(choices, token, lane);
      const int64_t slot = int64_t(peers.rank) * choices.capacity + token;
      send_row(peers, ranks, at.rows, slot, payload.rows + int64_t(token) * payload.row_vectors, payload.row_vectors,
               lane);
      send_row(peers, ranks, at.scales, slot, payload.scales + int64_t(token) * payload.scale_vectors,
               payload.scale_vectors, lane);
    }
  } else {
    send_choices(peers, at, choices, payload.weights, lane);
  }
  // Each thread's stores, then the block's count, then (in the last block) the flags: each link of the chain releases.
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* finished = region<unsigned>(peers, peers.rank, at.finished);
    if (count_finished(finished) + 1 == gridDim.x) {
      *finished = 0;  // for the next launch, which this stream orders after this one
      for (int rank = 0; rank < peers.ranks; ++rank) announce(peers, at, rank, epoch);
    }
  }
}

__global__ void signal_kernel(const __grid_constant__ Peers peers, const __grid_constant__ Regions at, uint64_t epoch) {
  __threadfence_system();
  if (threadIdx.x < peers.ranks) announce(peers, at, threadIdx.x, epoch);
}

__global__ void wait_kernel(const __grid_constant__ Peers peers, const __grid_constant__ Regions at, uint64_t epoch,
                            uint64_t timeout_ns) {
  const int source = threadIdx.x;
  if (source >= peers.ranks) return;
  const uint64_t* arrived = region<uint64_t>(peers, peers.rank, at.arrived) + source;
  const uint64_t begin = nanoseconds();
  while (load_acquire(arrived) < epoch) {
    if (nanoseconds() - begin > timeout_ns) {
      printf("headrace_dispatch: rank %d waited in vain for rank %d to reach epoch %llu\n", peers.rank, source,
             static_cast<unsigned long long>(epoch));
      __trap();
    }
    __nanosleep(100);
  }
}

__device__ __forceinline__ void add_piece(float (&sum)[8], const int4& piece) {
  const int words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // a BF16 is the upper half of an FP32
    sum[2 * i] += __int_as_float(words[i] << 16);
    sum[2 * i + 1] += __int_as_float(words[i] & 0xFFFF0000);
  }
}

__device__ __forceinline__ int4 round_piece(const float (&sum)[8]) {
  int words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    words[i] = *reinterpret_cast<const int*>(&pair);
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

// One token's results from the ranks it went to: all loads first, since a load over NVLink takes long, then the sum.
__device__ __forceinline__ void sum_results(const Peers& peers, unsigned ranks, int64_t offset, int64_t slot, int4* out,
                                            int pieces, int lane) {
  for (int i = lane; i < pieces; i += 32) {
    int4 piece[kMaxRanks];
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank)
      if (ranks >> rank & 1) piece[rank] = load_piece(region<int4>(peers, rank, offset) + slot * pieces + i);
    float sum[8] = {};
#pragma unroll
    for (int rank = 0; rank < kMaxRanks; ++rank)
      if (ranks >> rank & 1) add_piece(sum, piece[rank]);
    store_piece(out + i, round_piece(sum));
  }
}

__device__ __forceinline__ void fetch_weights(const Peers& peers, const Regions& at, const Choices& choices,
                                              float* weights, int lane) {
  const int64_t slot = int64_t(peers.rank) * choices.capacity * choices.chosen;
  for (int i = blockIdx.x * 32 + lane; i < choices.tokens * choices.chosen; i += gridDim.x * 32) {
    const int expert = choices.experts[i];
    weights[i] = expert < 0 ? 0.0f
                            : load_float(region<float>(peers, expert / choices.experts_per_rank, at.result_weights) +
                                         slot + i);
  }
}

__global__ void __launch_bounds__(kWarps * 32, 1)
    pull_kernel(const __grid_constant__ Peers peers, const __grid_constant__ Regions at,
                const __grid_constant__ Choices choices, int4* out, int pieces, float* weights) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == kRowWarps) {
    if (weights) fetch_weights(peers, at, choices, weights, lane);
    return;
  }
  for (int token = blockIdx.x * kRowWarps + warp; token < choices.tokens; token += gridDim.x * kRowWarps) {
    const unsigned ranks = ranks_of(choices, token, lane);
    const int64_t slot = int64_t(peers.rank) * choices.capacity + token;
    sum_results(peers, ranks, at.results, slot, out + int64_t(token) * pieces, pieces, lane);
  }
}

}  // namespace

cudaError_t push(const Peers& peers, const Regions& at, const Choices& choices, const Payload& payload, uint64_t epoch,
                 int blocks, cudaStream_t stream) {
  push_kernel<<<blocks, kWarps * 32, 0, stream>>>(peers, at, choices, payload, epoch);
  return cudaGetLastError();
}

cudaError_t signal(const Peers& peers, const Regions& at, uint64_t epoch, cudaStream_t stream) {
  signal_kernel<<<1, 32, 0, stream>>>(peers, at, epoch);
  return cudaGetLastError();
}

cudaError_t wait(const Peers& peers, const Regions& at, uint64_t epoch, uint64_t timeout_ns, cudaStream_t stream) {
  wait_kernel<<<1, 32, 0, stream>>>(peers, at, epoch, timeout_ns);
  return cudaGetLastError();
}

cudaError_t pull(const Peers& peers, const Regions& at, const Choices& choices, int4* out, int vectors, float* weights,
                 int blocks, cudaStream_t stream) {
  pull_kernel<<<blocks, kWarps * 32, 0, stream>>>(peers, at, choices, out, vectors, weights);
  return cudaGetLastError();
}

}  // namespace headrace
