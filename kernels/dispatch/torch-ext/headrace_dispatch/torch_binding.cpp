// The data movers as PyTorch operators, and memory that other processes can map.
//
// Two ways lead here: kernel-builder compiles this with its generated registration.h, and movers.py compiles it on
// demand with torch.utils.cpp_extension, which names the library by TORCH_EXTENSION_NAME alone.

#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <torch/types.h>

#include <cstring>

#include "dispatch_cuda/movers.h"

#if __has_include("registration.h")
#include "registration.h"
#else
#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)
#define REGISTER_EXTENSION(NAME)
#endif

namespace {

using at::Tensor;
using headrace::Choices;
using headrace::Payload;
using headrace::Peers;
using headrace::Regions;

constexpr int64_t kPiece = 16;  // bytes that one load or store moves

Peers peers_of(at::IntArrayRef buffers, int64_t rank) {
  const int64_t ranks = buffers.size();
  TORCH_CHECK(ranks >= 1 && ranks <= headrace::kMaxRanks, ranks, " ranks: 1 to ", headrace::kMaxRanks, " fit a node");
  TORCH_CHECK(rank >= 0 && rank < ranks, "rank ", rank, " of ", ranks);
  Peers peers{};
  for (int64_t i = 0; i < ranks; ++i) peers.buffer[i] = reinterpret_cast<char*>(buffers[i]);
  peers.ranks = static_cast<int>(ranks);
  peers.rank = static_cast<int>(rank);
  return peers;
}

Regions regions_of(at::IntArrayRef offsets) {
  TORCH_CHECK(offsets.size() == 8, offsets.size(), " regions; a buffer has 8");
  return {offsets[0], offsets[1], offsets[2], offsets[3], offsets[4], offsets[5], offsets[6], offsets[7]};
}

const Tensor& checked(const char* name, const Tensor& tensor, int64_t rows) {
  TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous() && tensor.dim() == 2 && tensor.size(0) == rows, name,
              " has to be a contiguous CUDA tensor of ", rows, " rows");
  return tensor;
}

int pieces_of(const char* name, const Tensor& tensor) {
  const int64_t bytes = tensor.size(1) * tensor.element_size();
  TORCH_CHECK(bytes % kPiece == 0 && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % kPiece == 0, name,
              " has rows of ", bytes, " bytes; they have to be multiples of ", kPiece, " and aligned to it");
  return static_cast<int>(bytes / kPiece);
}

Choices choices_of(const Tensor& experts, int64_t experts_per_rank, int64_t capacity) {
  checked("experts", experts, experts.size(0));
  TORCH_CHECK(experts.scalar_type() == at::kInt && experts.size(1) <= 32, "experts: int32, at most 32 of a token");
  TORCH_CHECK(experts.size(0) <= capacity, experts.size(0), " tokens; the buffers hold ", capacity, " of a rank");
  return {experts.data_ptr<int32_t>(), static_cast<int>(experts.size(1)), static_cast<int>(experts.size(0)),
          static_cast<int>(capacity), static_cast<int>(experts_per_rank)};
}

void push(const Tensor& rows, const std::optional<Tensor>& scales, const Tensor& experts, const Tensor& weights,
          at::IntArrayRef buffers, at::IntArrayRef regions, int64_t rank, int64_t experts_per_rank, int64_t capacity,
          int64_t epoch, int64_t blocks) {
  const c10::cuda::CUDAGuard guard(rows.device());
  const Choices choices = choices_of(experts, experts_per_rank, capacity);
  Payload payload{};
  payload.rows = static_cast<const int4*>(checked("rows", rows, choices.tokens).data_ptr());
  payload.row_vectors = pieces_of("rows", rows);
  if (scales) {
    payload.scales = static_cast<const int4*>(checked("scales", *scales, choices.tokens).data_ptr());
    payload.scale_vectors = pieces_of("scales", *scales);
  }
  TORCH_CHECK(weights.scalar_type() == at::kFloat && weights.sizes() == experts.sizes(), "weights: float32 as experts");
  payload.weights = checked("weights", weights, choices.tokens).data_ptr<float>();
  C10_CUDA_CHECK(headrace::push(peers_of(buffers, rank), regions_of(regions), choices, payload, epoch,
                                static_cast<int>(blocks), c10::cuda::getCurrentCUDAStream()));
}

void signal(at::IntArrayRef buffers, at::IntArrayRef regions, int64_t rank, int64_t epoch) {
  C10_CUDA_CHECK(
      headrace::signal(peers_of(buffers, rank), regions_of(regions), epoch, c10::cuda::getCurrentCUDAStream()));
}

void wait(at::IntArrayRef buffers, at::IntArrayRef regions, int64_t rank, int64_t epoch, int64_t timeout_ms) {
  C10_CUDA_CHECK(headrace::wait(peers_of(buffers, rank), regions_of(regions), epoch, timeout_ms * 1'000'000ull,
                                c10::cuda::getCurrentCUDAStream()));
}

void pull(const Tensor& out, const std::optional<Tensor>& weights, const Tensor& experts, at::IntArrayRef buffers,
          at::IntArrayRef regions, int64_t rank, int64_t experts_per_rank, int64_t capacity, int64_t blocks) {
  const c10::cuda::CUDAGuard guard(out.device());
  const Choices choices = choices_of(experts, experts_per_rank, capacity);
  TORCH_CHECK(checked("out", out, choices.tokens).scalar_type() == at::kBFloat16, "out has to be bfloat16");
  float* fetched = nullptr;
  if (weights) {
    TORCH_CHECK(weights->scalar_type() == at::kFloat && weights->sizes() == experts.sizes(),
                "weights: float32 as experts");
    fetched = checked("weights", *weights, choices.tokens).data_ptr<float>();
  }
  const int pieces = pieces_of("out", out);
  C10_CUDA_CHECK(headrace::pull(peers_of(buffers, rank), regions_of(regions), choices,
                                static_cast<int4*>(out.data_ptr()), pieces, fetched, static_cast<int>(blocks),
                                c10::cuda::getCurrentCUDAStream()));
}

// Memory of its own for a buffer: what PyTorch's allocator hands out is a piece of a larger block, which cannot be
// shared by itself. All zeros, so that no epoch has been reached.
int64_t allocate(int64_t bytes) {
  void* address = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&address, bytes));
  C10_CUDA_CHECK(cudaMemset(address, 0, bytes));
  C10_CUDA_CHECK(cudaDeviceSynchronize());
  return reinterpret_cast<int64_t>(address);
}

void release(int64_t address) { C10_CUDA_CHECK(cudaFree(reinterpret_cast<void*>(address))); }

// What another process of this machine needs to map the memory: 64 bytes.
Tensor share(int64_t address) {
  cudaIpcMemHandle_t handle;
  C10_CUDA_CHECK(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(address)));
  Tensor bytes = at::empty({sizeof(handle)}, at::kByte);
  std::memcpy(bytes.data_ptr(), &handle, sizeof(handle));
  return bytes;
}

int64_t map(const Tensor& shared) {
  cudaIpcMemHandle_t handle;
  TORCH_CHECK(shared.device().is_cpu() && shared.is_contiguous() && shared.scalar_type() == at::kByte &&
                  shared.numel() == sizeof(handle),
              "a shared buffer is ", sizeof(handle), " bytes in a uint8 tensor on the CPU");
  std::memcpy(&handle, shared.data_ptr(), sizeof(handle));
  void* address = nullptr;
  C10_CUDA_CHECK(cudaIpcOpenMemHandle(&address, handle, cudaIpcMemLazyEnablePeerAccess));
  return reinterpret_cast<int64_t>(address);
}

void unmap(int64_t address) { C10_CUDA_CHECK(cudaIpcCloseMemHandle(reinterpret_cast<void*>(address))); }

// The bytes at an address of this device as a tensor, which does not own them.
Tensor view(int64_t address, int64_t bytes) {
  const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCUDA, c10::cuda::current_device());
  return at::from_blob(reinterpret_cast<void*>(address), {bytes}, options);
}

}  // namespace

TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "push(Tensor rows, Tensor? scales, Tensor experts, Tensor weights, int[] buffers, int[] regions, int rank, "
      "int experts_per_rank, int capacity, int epoch, int blocks) -> ()",
      &push);
  ops.def("signal(int[] buffers, int[] regions, int rank, int epoch) -> ()", &signal);
  ops.def("wait(int[] buffers, int[] regions, int rank, int epoch, int timeout_ms) -> ()", &wait);
  ops.def(
      "pull(Tensor(a!) out, Tensor(b!)? weights, Tensor experts, int[] buffers, int[] regions, int rank, "
      "int experts_per_rank, int capacity, int blocks) -> ()",
      &pull);
  ops.def("allocate(int bytes) -> int", &allocate);
  ops.def("release(int address) -> ()", &release);
  ops.def("share(int address) -> Tensor", &share);
  ops.def("map(Tensor shared) -> int", &map);
  ops.def("unmap(int address) -> ()", &unmap);
  ops.def("view(int address, int bytes) -> Tensor", &view);
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
