/* A CUDA driver that runs nothing and notes what is launched, for Triton's own launcher to talk to. Built as libcuda. */

#include <stdint.h>
#include <string.h>

enum { kMostParameters = 64, kMostLaunches = 64, kRelaxed = 2, kUnsupportedInCapture = 900 };

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned num_attributes;
} Config; /* CUlaunchConfig */

typedef struct {
    uint64_t function, stream, parameters[kMostParameters];
    unsigned grid[3], threads, shared, count;
} Launch;

Launch stub_launches[kMostLaunches];
int stub_num_launches = 0;
int stub_capturing = 0; /* 1: a graph is captured, 2: and the driver is an old one, which loads nothing then */
int stub_loaded = 0;
int stub_device = 0;

static unsigned counts[256]; /* of parameters, by the number of the function */
static int mode = 0;

void stub_expect(uint64_t function, unsigned count) { counts[function] = count; }
int stub_mode(void) { return mode; }

int cuGetErrorString(int error, const char **text) {
    *text = error == kUnsupportedInCapture ? "operation not permitted when stream is capturing" : "an error";
    return 0;
}
int cuThreadExchangeStreamCaptureMode(int *wanted) {
    int before = mode;
    mode = *wanted;
    *wanted = before;
    return 0;
}
int cuModuleLoadData(void **module, const void *image) {
    if (stub_capturing == 2 || (stub_capturing && mode != kRelaxed)) return kUnsupportedInCapture;
    *module = (void *)(intptr_t)++stub_loaded;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
    *value = attribute == 0 ? 1024 : 0; /* the most threads a block; registers and bytes spilled */
    return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 97 ? 232448 : 1; /* shared memory a block may opt in to */
    return 0;
}
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &stub_device, 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuCtxGetCurrent(void **context) { return *context = &stub_device, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { return *device = stub_device, 0; }
int cuCtxGetLimit(size_t *value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = stub_capturing != 0, 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t address) { return *value = address, 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }

int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
    Launch *launch = &stub_launches[stub_num_launches++ % kMostLaunches];
    launch->function = (uint64_t)(intptr_t)function;
    launch->stream = (uint64_t)(intptr_t)config->stream;
    launch->threads = config->block[0] * config->block[1] * config->block[2];
    launch->shared = config->shared;
    launch->count = counts[launch->function];
    memcpy(launch->grid, config->grid, sizeof launch->grid);
    for (unsigned i = 0; i < launch->count; ++i) memcpy(&launch->parameters[i], parameters[i], 8);
    return 0;
}
