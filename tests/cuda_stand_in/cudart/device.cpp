// The device, an H200; kernels' attributes and registration; errors.

#include <cstdio>
#include <cstring>

#include "rules.h"

API cudaGetDeviceCount(int* n) { return give(n, 1); }
static thread_local int device = 0;
API cudaGetDevice(int* d) { return give(d, device); }
API cudaSetDevice(int d) {
  device = d;
  return cudaSuccess;
}
API cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200 (stand-in)");
  p->totalGlobalMem = MEMORY;
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
static const std::map<int, int> ATTRIBUTES = {
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrL2CacheSize, 60 << 20},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
};
API cudaDeviceGetAttribute(int* v, cudaDeviceAttr attribute, int) {
  auto found = ATTRIBUTES.find(attribute);
  return give(v, found == ATTRIBUTES.end() ? 0 : found->second);
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
API cudaDriverGetVersion(int* v) { return give(v, 13000); }
API cudaRuntimeGetVersion(int* v) { return give(v, 13000); }
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
  auto error = last_error;
  last_error = cudaSuccess;
  return error;
}
API cudaPeekAtLastError() { return last_error; }
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
API cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                     cudaDriverEntryPointQueryResult* result) {
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return give(function, nullptr);
}
API cudaGetSymbolAddress(void** p, const void*) {
  static char memory[1 << 16];
  return give(p, memory);
}

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* h[4];
  return h;
}
EXPORT char __cudaInitModule(void**) { return 1; }
static thread_local struct {
  dim3 g, b;
  size_t m;
  cudaStream_t s;
} configuration;
EXPORT unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t m, cudaStream_t s) {
  configuration = {g, b, m, s};
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* m, void* s) {
  *g = configuration.g;
  *b = configuration.b;
  *m = configuration.m;
  *(cudaStream_t*)s = configuration.s;
  return cudaSuccess;
}
