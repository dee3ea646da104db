// A CUDA runtime without a GPU, to stand in for libcudart.so.13: kernels do nothing, memory is the
// host's, and captures, streams and events keep the rules that a program can break. PyTorch's own
// allocator, graphs and autograd run on it as on a GPU. README.md says how to use it.
//
// STAND_IN_VERBOSE=1 tells of each rule that is broken and of each capture; STAND_IN_TRAP=1 aborts
// at a launch beside a capture of the same thread.

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

// A capture, and the graph that comes of it. joined: the streams that take part; work: how much was
// launched on each; waited: how much of that another stream has waited for.
struct Graph {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  void* origin;
  unsigned long thread;
  long kernels = 0, copies = 0, sets = 0, hosts = 0;
  bool invalid = false;
  std::set<void*> joined;
  std::map<void*, long> work, waited;
};
struct Stream {
  Graph* capture = nullptr;
  int priority = 0;
};
struct Event {
  Graph* capture = nullptr;
  void* stream = nullptr;
  long at = 0;  // the stream's work when the event was recorded
};

static std::recursive_mutex lock;
struct Locked {
  std::lock_guard<std::recursive_mutex> guard{lock};
};
static Stream legacy;
static std::map<void*, size_t> device_memory, host_memory;
static size_t used = 0;
static const size_t TOTAL = size_t(139) << 30;
static std::atomic<unsigned long long> ids{1};
static thread_local cudaError_t last = cudaSuccess;
static thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static std::set<Graph*> capturing;
static long launches = 0, escaped = 0, graph_launches = 0, syncs = 0;
static bool verbose = getenv("STAND_IN_VERBOSE");
#define EXPORT extern "C" __attribute__((visibility("default")))
#define API EXPORT cudaError_t
static cudaError_t fail(cudaError_t e, const char* what) {
  if (verbose) fprintf(stderr, "stand-in: %s -> %d\n", what, int(e));
  return last = e;
}
template <typename T, typename V>
static cudaError_t give(T* to, V value) {
  *to = T(value);
  return cudaSuccess;
}
static Stream* of(cudaStream_t s) {
  return (s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread) ? &legacy : (Stream*)s;
}
static unsigned long self() { return (unsigned long)pthread_self(); }
// whether an unsafe call breaks a capture: of any thread in global mode, of this one in
// thread_local
static Graph* broken_by_unsafe() {
  if (mode == cudaStreamCaptureModeRelaxed) return nullptr;
  for (auto* g : capturing) {
    if (g->mode == cudaStreamCaptureModeGlobal && mode == cudaStreamCaptureModeGlobal) return g;
    if (g->mode != cudaStreamCaptureModeRelaxed && g->thread == self()) return g;
  }
  return nullptr;
}
// ends the capture, if there is one, by what must not be called in it
static cudaError_t unsafe(Graph* capture, const char* what) {
  if (!capture) return cudaSuccess;
  capture->invalid = true;
  return fail(cudaErrorStreamCaptureUnsupported, what);
}
static cudaError_t launch(cudaStream_t s, long Graph::* kind) {
  Locked _;
  auto* stream = of(s);
  if (stream->capture) {
    (stream->capture->*kind)++;
    stream->capture->work[stream]++;
  } else {
    launches++;
    for (auto* g : capturing)
      if (g->thread == self()) {
        escaped++;
        if (verbose) fprintf(stderr, "stand-in: a launch outside of this thread's capture\n");
        if (getenv("STAND_IN_TRAP")) abort();
      }
  }
  return cudaSuccess;
}
EXPORT void stand_in_counts(long* out) {
  out[0] = launches;
  out[1] = escaped;
  out[2] = graph_launches;
  out[3] = syncs;
  out[4] = long(used);
  out[5] = long(capturing.size());
}

API cudaGetDeviceCount(int* n) {
  return give(n, getenv("STAND_IN_GPUS") ? atoi(getenv("STAND_IN_GPUS")) : 1);
}
static thread_local int device = 0;
API cudaGetDevice(int* d) { return give(d, device); }
API cudaSetDevice(int d) {
  device = d;
  return cudaSuccess;
}
API cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (stand-in)");
  p->totalGlobalMem = TOTAL;
  p->sharedMemPerBlock = 49152;
  p->regsPerBlock = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->major = 9;
  p->minor = 0;
  p->multiProcessorCount = 132;
  p->maxThreadsPerMultiProcessor = 2048;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlockOptin = 232448;
  p->l2CacheSize = 60 << 20;
  p->unifiedAddressing = 1;
  p->managedMemory = 1;
  p->maxBlocksPerMultiProcessor = 32;
  p->canMapHostMemory = 1;
  p->concurrentKernels = 1;
  return cudaSuccess;
}
API cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrComputeCapabilityMajor: *v = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *v = 0; break;
    case cudaDevAttrMultiProcessorCount: *v = 132; break;
    case cudaDevAttrMaxThreadsPerBlock: *v = 1024; break;
    case cudaDevAttrWarpSize: *v = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *v = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = 232448; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *v = 2048; break;
    case cudaDevAttrL2CacheSize: *v = 60 << 20; break;
    case cudaDevAttrUnifiedAddressing: *v = 1; break;
    case cudaDevAttrMaxGridDimX: *v = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *v = 65535; break;
    default: *v = 0;
  }
  return cudaSuccess;
}
API cudaDeviceCanAccessPeer(int* v, int, int) { return give(v, 0); }
API cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { return give(p, nullptr); }
API cudaDeviceGetPCIBusId(char* s, int n, int) {
  snprintf(s, n, "0000:00:00.0");
  return cudaSuccess;
}
API cudaDeviceGetStreamPriorityRange(int* low, int* high) {
  *low = 0;
  *high = -5;
  return cudaSuccess;
}
API cudaDeviceSynchronize() {
  Locked _;
  syncs++;
  if (auto e = unsafe(broken_by_unsafe(), "cudaDeviceSynchronize")) return e;
  return cudaSuccess;
}
API cudaDriverGetVersion(int* v) { return give(v, 13000); }
API cudaRuntimeGetVersion(int* v) { return give(v, 13000); }
API cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return give(e, (cudaEvent_t) new Event); }
API cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }
API cudaEventDestroy(cudaEvent_t e) {
  delete (Event*)e;
  return cudaSuccess;
}
API cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) { return give(t, 1); }
API cudaEventQuery(cudaEvent_t e) {
  Locked _;
  auto* g = ((Event*)e)->capture;
  if (auto refusal = unsafe(capturing.count(g) ? g : nullptr, "cudaEventQuery of a captured event"))
    return refusal;
  return cudaSuccess;
}
API cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
  Locked _;
  auto* event = (Event*)e;
  auto* stream = of(s);
  event->capture = stream->capture;
  event->stream = stream;
  event->at = stream->capture ? stream->capture->work[stream] : 0;
  return cudaSuccess;
}
API cudaEventRecord(cudaEvent_t e, cudaStream_t s) { return cudaEventRecordWithFlags(e, s, 0); }
API cudaEventSynchronize(cudaEvent_t e) {
  Locked _;
  syncs++;
  auto* g = ((Event*)e)->capture;
  if (auto refusal = unsafe(capturing.count(g) ? g : nullptr, "cudaEventSynchronize in a capture"))
    return refusal;
  return cudaSuccess;
}
API cudaMalloc(void** p, size_t n) {
  Locked _;
  if (auto e = unsafe(broken_by_unsafe(), "cudaMalloc")) return e;
  if (used + n > TOTAL) return fail(cudaErrorMemoryAllocation, "cudaMalloc: out of memory");
  n = (n + (2 << 20) - 1) & ~size_t((2 << 20) - 1);
  void* m =
      mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "mmap");
  device_memory[m] = n;
  used += n;
  *p = m;
  return cudaSuccess;
}
API cudaFree(void* p) {
  Locked _;
  if (!p) return cudaSuccess;
  if (auto e = unsafe(broken_by_unsafe(), "cudaFree")) return e;
  auto it = device_memory.find(p);
  if (it == device_memory.end())
    return fail(cudaErrorInvalidValue, "cudaFree of an unknown address");
  used -= it->second;
  munmap(p, it->second);
  device_memory.erase(it);
  return cudaSuccess;
}
API cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
API cudaHostAlloc(void** p, size_t n, unsigned) {
  Locked _;
  if (auto e = unsafe(broken_by_unsafe(), "cudaHostAlloc")) return e;
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
  *f = TOTAL - used;
  *t = TOTAL;
  return cudaSuccess;
}
static cudaError_t copy(void* to, const void* from, size_t n, cudaStream_t s, bool async,
                        cudaMemcpyKind kind) {
  Locked _;
  auto* stream = of(s);
  if (stream->capture) {
    bool pageable = (!within(device_memory, to) && !within(host_memory, to)) ||
                    (!within(device_memory, from) && !within(host_memory, from));
    if (!async || pageable) {
      stream->capture->invalid = true;
      return fail(cudaErrorStreamCaptureUnsupported, "a copy of pageable memory in a capture");
    }
    launch(s, &Graph::copies);
    return cudaSuccess;
  }
  if (!async) {
    syncs++;
    if (auto e = unsafe(broken_by_unsafe(), "cudaMemcpy")) return e;
  }
  launch(s, &Graph::copies);
  memmove(to, from, n);
  return cudaSuccess;
}
API cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind k) {
  return copy(to, from, n, nullptr, false, k);
}
API cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind k, cudaStream_t s) {
  return copy(to, from, n, s, true, k);
}
API cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t s) {
  return copy(to, from, n, s, true, cudaMemcpyDeviceToDevice);
}
API cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind,
                      cudaStream_t s) {
  return launch(s, &Graph::copies);
}
API cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t s) {
  Locked _;
  launch(s, &Graph::sets);
  if (!of(s)->capture && n < (64 << 20)) memset(p, v, n);
  return cudaSuccess;
}
API cudaMemset(void* p, int v, size_t n) { return cudaMemsetAsync(p, v, n, nullptr); }
API cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int p) {
  auto* n = new Stream;
  n->priority = p;
  *s = (cudaStream_t)n;
  return cudaSuccess;
}
API cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }
API cudaStreamGetPriority(cudaStream_t s, int* p) { return give(p, of(s)->priority); }
API cudaStreamQuery(cudaStream_t s) {
  Locked _;
  if (auto e = unsafe(of(s)->capture, "cudaStreamQuery")) return e;
  return cudaSuccess;
}
API cudaStreamSynchronize(cudaStream_t s) {
  Locked _;
  syncs++;
  if (auto e = unsafe(of(s)->capture, "cudaStreamSynchronize")) return e;
  if (s == nullptr)
    if (auto e = unsafe(broken_by_unsafe(), "cudaStreamSynchronize of the default stream"))
      return e;
  return cudaSuccess;
}
API cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
  Locked _;
  auto* stream = of(s);
  auto* event = (Event*)e;
  if (event->capture && capturing.count(event->capture)) {
    auto* g = event->capture;
    if (stream->capture && stream->capture != g)
      return fail(cudaErrorStreamCaptureMerge, "two captures meet");
    if (!stream->capture) {
      if (stream == &legacy) {
        g->invalid = true;
        return fail(cudaErrorStreamCaptureImplicit, "the default stream waits for a capture");
      }
      stream->capture = g;
      g->joined.insert(stream);
    }
    auto& seen = g->waited[event->stream];
    if (event->at > seen) seen = event->at;
  } else if (stream->capture && event->stream && !event->capture) {
    // work before the capture, on another stream: CUDA refuses to wait for it
    stream->capture->invalid = true;
    return fail(cudaErrorStreamCaptureIsolation, "a capture waits for work outside of it");
  }
  return cudaSuccess;
}
API cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t, void*, unsigned) {
  return launch(s, &Graph::hosts);
}
API cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* d) {
  launch(s, &Graph::hosts);
  if (!of(s)->capture) f(d);
  return cudaSuccess;
}
API cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode m) {
  Locked _;
  auto* stream = of(s);
  if (stream == &legacy)
    return fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream");
  if (stream->capture) return fail(cudaErrorIllegalState, "a stream that is captured already");
  auto* g = new Graph{ids++, m, stream, self()};
  g->joined.insert(stream);
  stream->capture = g;
  capturing.insert(g);
  return cudaSuccess;
}
API cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* out) {
  Locked _;
  auto* stream = of(s);
  auto* g = stream->capture;
  if (!g) return fail(cudaErrorIllegalState, "the end of no capture");
  if (g->mode != cudaStreamCaptureModeRelaxed && g->thread != self())
    return fail(cudaErrorStreamCaptureWrongThread, "the end of another thread's capture");
  bool unjoined = false;
  for (auto* one : g->joined) {
    ((Stream*)one)->capture = nullptr;
    if (one != g->origin && g->work[one] > g->waited[one]) unjoined = true;
  }
  capturing.erase(g);
  *out = nullptr;
  if (g->invalid) return fail(cudaErrorStreamCaptureInvalidated, "the end of an invalid capture");
  if (unjoined) return fail(cudaErrorStreamCaptureUnjoined, "a stream that was not joined");
  *out = (cudaGraph_t)g;
  if (verbose)
    fprintf(stderr, "stand-in: captured %ld kernels, %ld copies, %ld sets\n", g->kernels, g->copies,
            g->sets);
  return cudaSuccess;
}
API cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* v) {
  Locked _;
  auto* g = of(s)->capture;
  *v = !g           ? cudaStreamCaptureStatusNone
       : g->invalid ? cudaStreamCaptureStatusInvalidated
                    : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
API cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* v, unsigned long long* id,
                             cudaGraph_t* graph, const cudaGraphNode_t** deps,
                             const cudaGraphEdgeData** edges, size_t* n) {
  Locked _;
  cudaStreamIsCapturing(s, v);
  auto* g = of(s)->capture;
  if (id) *id = g ? g->id : 0;
  if (graph) *graph = (cudaGraph_t)g;
  if (deps) *deps = nullptr;
  if (edges) *edges = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  std::swap(*m, mode);
  return cudaSuccess;
}
API cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t*, size_t* n) {
  auto* x = (Graph*)g;
  *n = x->kernels + x->copies + x->sets;
  return cudaSuccess;
}
API cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* n) {
  return give(n, 0);
}
API cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long) {
  return give(e, (cudaGraphExec_t)g);
}
API cudaGraphLaunch(cudaGraphExec_t, cudaStream_t s) {
  Locked _;
  graph_launches++;
  launch(s, &Graph::kernels);
  return cudaSuccess;
}
API cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(s, &Graph::kernels);
}
API cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(s, &Graph::kernels);
}
API cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
  return launch(c->stream, &Graph::kernels);
}
API __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t s) {
  return launch(s, &Graph::kernels);
}
API __cudaGetKernel(cudaKernel_t* k, const void* f) { return give(k, (cudaKernel_t)f); }
API cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  return give(n, 2);
}
API cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t,
                                                           unsigned) {
  return give(n, 2);
}
API cudaGetLastError() {
  auto e = last;
  last = cudaSuccess;
  return e;
}
API cudaPeekAtLastError() { return last; }
EXPORT const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorMemoryAllocation: return "out of memory";
    default: return "an error of the stand-in";
  }
}
EXPORT const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
API cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                     cudaDriverEntryPointQueryResult* r) {
  if (verbose) fprintf(stderr, "stand-in: entry point %s\n", name);
  *f = nullptr;
  if (r) *r = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
API cudaGetSymbolAddress(void** p, const void*) {
  static char memory[1 << 16];
  *p = memory;
  return cudaSuccess;
}
extern "C" {
#define V __attribute__((visibility("default")))
V void** __cudaRegisterFatBinary(void*) {
  static void* h[4];
  return h;
}
V char __cudaInitModule(void**) { return 1; }
static thread_local struct {
  dim3 g, b;
  size_t m;
  cudaStream_t s;
} configuration;
V unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t m, cudaStream_t s) {
  configuration = {g, b, m, s};
  return 0;
}
V cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* m, void* s) {
  *g = configuration.g;
  *b = configuration.b;
  *m = configuration.m;
  *(cudaStream_t*)s = configuration.s;
  return cudaSuccess;
}
}
EXPORT void stand_in_launch(void* s) { launch((cudaStream_t)s, &Graph::kernels); }
EXPORT void stand_in_pageable(void* s) {
  Locked _;
  if (auto* g = of((cudaStream_t)s)->capture) g->invalid = true;
}
