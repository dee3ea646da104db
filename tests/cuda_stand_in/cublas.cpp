// What PyTorch reads of cuBLAS's results; all other functions only succeed, and build.py generates
// them. No product is computed.

#include <cstddef>
#include <cstdlib>
#include <cstring>

#define V extern "C" __attribute__((visibility("default")))

static int made(void** handle) {
  *handle = calloc(1, 512);
  return 0;
}
V int cublasCreate_v2(void** handle) { return made(handle); }
V int cublasLtCreate(void** handle) { return made(handle); }
V int cublasLtMatmulDescCreate(void** desc, int, int) { return made(desc); }
V int cublasLtMatrixLayoutCreate(void** layout, int, unsigned long, unsigned long, long) {
  return made(layout);
}
V int cublasLtMatmulPreferenceCreate(void** preference) { return made(preference); }

struct Heuristic {
  unsigned long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
V int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int,
                                     Heuristic* result, int* found) {
  memset(result, 0, sizeof *result);
  *found = 1;
  return 0;
}
V int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}
V int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
V int cublasGetVersion_v2(void*, int* version) {
  *version = 130000;
  return 0;
}
V size_t cublasLtGetVersion() { return 130000; }
V int cublasGetSmCountTarget(void*, int* count) {
  *count = 0;
  return 0;
}
