// What torch_binding.cpp calls and movers.cu implements: plain pointers and sizes, nothing of PyTorch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace headrace {

constexpr int kMaxRanks = 8;  // GPUs that reach each other's memory: one node

// One buffer per rank, its own and the other ranks' as they are mapped here.
struct Peers {
  char* buffer[kMaxRanks];
  int ranks;
  int rank;  // this process's
};

// Where things lie in a buffer, in bytes from its start; the same in all buffers (BufferPlan in peers.py).
// Slot (source, token) of a region is that of a token of rank `source`.
struct Regions {
  int64_t rows;              // [ranks, capacity, row bytes], received
  int64_t scales;            // [ranks, capacity, scale bytes], received
  int64_t experts;           // int32 [ranks, capacity, chosen], received; -1 for slots without a token
  int64_t weights;           // FP32 [ranks, capacity, chosen], received
  int64_t results;           // BF16 [ranks, capacity, columns], offered to the ranks that own the tokens
  int64_t result_weights;    // FP32 [ranks, capacity, chosen], offered likewise
  int64_t arrived;           // uint64 [kMaxRanks]: epoch that each source has reached
  int64_t finished;          // uint32: blocks of the running kernel that are done
};

// Which experts this rank's tokens chose. Expert e lives on rank e / experts_per_rank; a negative one nowhere.
struct Choices {
  const int32_t* experts;  // [tokens, chosen], chosen <= 32
  int chosen;
  int tokens;
  int capacity;  // tokens that a rank may have
  int experts_per_rank;
};

struct Payload {
  const int4* rows;  // [tokens, row_vectors] pieces of 16 bytes
  int row_vectors;
  const int4* scales;  // [tokens, scale_vectors]; no scales: 0 pieces
  int scale_vectors;
  const float* weights;  // [tokens, chosen]
};

// Send each token's row, scales, experts and weights; then tell every rank that `epoch` is reached.
cudaError_t push(const Peers&, const Regions&, const Choices&, const Payload&, uint64_t epoch, int blocks,
                 cudaStream_t);

// Tell every rank that all earlier work of this stream is done.
cudaError_t signal(const Peers&, const Regions&, uint64_t epoch, cudaStream_t);

// Hold this stream until every rank has reached `epoch`. Stops the kernel with a trap after `timeout_ns`.
cudaError_t wait(const Peers&, const Regions&, uint64_t epoch, uint64_t timeout_ns, cudaStream_t);

// Sum each token's results over the ranks it went to: BF16 [tokens, vectors * 8]; and, unless `weights` is null, fetch
// for each of its experts the FP32 number that the expert's rank offers, [tokens, chosen].
cudaError_t pull(const Peers&, const Regions&, const Choices&, int4* out, int vectors, float* weights, int blocks,
                 cudaStream_t);

}  // namespace headrace
