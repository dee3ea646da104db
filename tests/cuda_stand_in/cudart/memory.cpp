// Memory, which is the host's; copies and fills, which are done unless they are captured.

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "rules.h"

static std::map<void*, size_t> device_memory, host_memory;

API cudaMalloc(void** p, size_t n) {
  Locked _;
  if (auto e = unsafe(broken_by_unsafe_calls(), "cudaMalloc")) return e;
  if (bytes + n > MEMORY) return fail(cudaErrorMemoryAllocation, "cudaMalloc: out of memory");
  n = (n + (2 << 20) - 1) & ~size_t((2 << 20) - 1);
  void* m =
      mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "mmap");
  device_memory[m] = n;
  bytes += n;
  *p = m;
  return cudaSuccess;
}
API cudaFree(void* p) {
  Locked _;
  if (!p) return cudaSuccess;
  if (auto e = unsafe(broken_by_unsafe_calls(), "cudaFree")) return e;
  auto it = device_memory.find(p);
  if (it == device_memory.end())
    return fail(cudaErrorInvalidValue, "cudaFree of an unknown address");
  bytes -= it->second;
  munmap(p, it->second);
  device_memory.erase(it);
  return cudaSuccess;
}
API cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaHostAlloc(void** p, size_t n, unsigned) {
  Locked _;
  if (auto e = unsafe(broken_by_unsafe_calls(), "cudaHostAlloc")) return e;
  *p = aligned_alloc(4096, (n + 4095) & ~size_t(4095));
  host_memory[*p] = n;
  return cudaSuccess;
}
API cudaFreeHost(void* p) {
  Locked _;
  host_memory.erase(p);
  free(p);
  return cudaSuccess;
}
static bool within(const std::map<void*, size_t>& blocks, const void* p) {
  auto it = blocks.upper_bound((void*)p);
  if (it == blocks.begin()) return false;
  --it;
  return (const char*)p < (const char*)it->first + it->second;
}
API cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Locked _;
  memset(a, 0, sizeof *a);
  if (within(device_memory, p)) {
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void*)p;
  } else if (within(host_memory, p)) {
    a->type = cudaMemoryTypeHost;
    a->hostPointer = a->devicePointer = (void*)p;
  } else
    a->type = cudaMemoryTypeUnregistered;
  return cudaSuccess;
}
API cudaMemGetInfo(size_t* f, size_t* t) {
  *f = MEMORY - bytes;
  *t = MEMORY;
  return cudaSuccess;
}
static cudaError_t copy(void* to, const void* from, size_t n, cudaStream_t s, bool async) {
  Locked _;
  auto* stream = of(s);
  if (stream->capture) {
    bool pageable = (!within(device_memory, to) && !within(host_memory, to)) ||
                    (!within(device_memory, from) && !within(host_memory, from));
    if (!async || pageable) {
      stream->capture->invalid = true;
      return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    }
    return launch(s);
  }
  if (!async) {
    waits++;
    if (auto e = unsafe(broken_by_unsafe_calls(), "cudaMemcpy")) return e;
  }
  launch(s);
  memmove(to, from, n);
  return cudaSuccess;
}
API cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  return copy(to, from, n, nullptr, false);
}
API cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t s) {
  return copy(to, from, n, s, true);
}
API cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return copy(to, from, n, s, true);
}
API cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind,
                      cudaStream_t s) {
  return launch(s);
}
API cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  Locked _;
  launch(s);
  if (!of(s)->capture && n < (64 << 20)) memset(p, v, n);
  return cudaSuccess;
}
API cudaMemset(void* p, int v, size_t n) { return cudaMemsetAsync(p, v, n, nullptr); }
