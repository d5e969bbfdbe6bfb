/* Run a compiled model without Python:  ./run BUNDLE OUTPUT_FOLDER [--threads N] [--repeat N] input0.npy input1.npy ...

   Inputs come in the order of manifest.json, as NumPy files in C order; output number i is written to OUTPUT_FOLDER/i.npy.
   With --repeat the model runs once to warm up and then N times, and the median time of those is printed.
   Build: cc -O2 run.c -o run -ldl -I$(tvm-ffi-config --includedir) -I$(tvm-ffi-config --dlpack-includedir)            */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

enum { MAX_INPUTS = 256, MAX_DIMS = 32, LEAST_RECORD = 64 /* bytes */ };

static int (*get_global)(const TVMFFIByteArray *, TVMFFIObjectHandle *);
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny *, int32_t, TVMFFIAny *);
static void (*move_error)(TVMFFIObjectHandle *);
static int (*make_tensor)(DLManagedTensor *, int32_t, int32_t, TVMFFIObjectHandle *);
static TVMFFIObjectHandle module_get_function;

static void fail(const char *what, const char *why) {
  fprintf(stderr, "run: %s: %s\n", what, why);
  exit(1);
}

static void *load(const char *folder, const char *name) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!library) fail(path, dlerror());
  return library;
}

static TVMFFIAny call(const char *what, TVMFFIObjectHandle function, TVMFFIAny *args, int count) {
  TVMFFIAny result = {0};
  if (call_function(function, args, count, &result)) {
    TVMFFIObjectHandle error = NULL;
    move_error(&error);
    TVMFFIErrorCell *cell = (TVMFFIErrorCell *)((char *)error + sizeof(TVMFFIObject));
    fail(what, error ? cell->message.data : "unknown error");
  }
  return result;
}

static TVMFFIAny text(const char *value) {
  TVMFFIAny any = {.type_index = kTVMFFIRawStr};
  any.v_c_str = value;
  return any;
}

static TVMFFIAny number(int64_t value) {
  TVMFFIAny any = {.type_index = kTVMFFIInt};
  any.v_int64 = value;
  return any;
}

static TVMFFIObjectHandle global(const char *name) {
  TVMFFIByteArray key = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (get_global(&key, &function) || !function) fail(name, "not in libtvm_runtime.so");
  return function;
}

static TVMFFIObjectHandle method(TVMFFIAny module, const char *name) {
  TVMFFIAny args[3] = {module, text(name), {.type_index = kTVMFFIBool}};
  args[2].v_int64 = 1;
  TVMFFIAny function = call(name, module_get_function, args, 3);
  if (function.type_index != kTVMFFIFunction) fail(name, "not in the library");
  return function.v_obj;
}

static size_t bytes_of(const DLTensor *tensor) {
  size_t count = (tensor->dtype.bits * tensor->dtype.lanes + 7) / 8;
  for (int axis = 0; axis < tensor->ndim; ++axis) count *= (size_t)tensor->shape[axis];
  return count;
}

typedef struct { const char *path; char *start; size_t size, at; } File;

/* Pages are read when they are used, and what is written to them never reaches the file. */
static File map(const char *path) {
  File file = {.path = path};
  struct stat status;
  int handle = open(path, O_RDONLY);
  if (handle < 0 || fstat(handle, &status)) fail(path, "cannot be opened");
  file.size = (size_t)status.st_size;
  if (file.size) file.start = mmap(NULL, file.size, PROT_READ | PROT_WRITE, MAP_PRIVATE, handle, 0);
  if (file.start == MAP_FAILED) fail(path, "cannot be mapped");
  close(handle);
  return file;
}

/* The next array of a file of NumPy records; its elements stay where they are. */
static void next_array(File *file, DLTensor *tensor) {
  const unsigned char *start = (unsigned char *)file->start + file->at;
  size_t left = file->size - file->at;
  if (left < 12 || memcmp(start, "\x93NUMPY", 6)) fail(file->path, "is no .npy file, or is truncated");
  size_t prefix = start[6] == 1 ? 10 : 12;
  size_t length = start[8] | start[9] << 8 | (prefix == 12 ? start[10] << 16 | (size_t)start[11] << 24 : 0);
  char *header = length < 65536 && prefix + length <= left ? calloc(1, length + 1) : NULL;
  if (!header) fail(file->path, "is truncated");
  memcpy(header, start + prefix, length);
  const char *descr = strstr(header, "'descr': '"), *shape = strstr(header, "'shape': (");
  if (!descr || !shape || !strstr(header, "'fortran_order': False")) fail(file->path, "is not in C order");
  descr += strlen("'descr': '");
  static const char kinds[] = "iufb";
  static const uint8_t codes[] = {kDLInt, kDLUInt, kDLFloat, kDLBool};
  const char *kind = descr[0] != '>' && descr[1] ? strchr(kinds, descr[1]) : NULL;
  if (!kind) fail(file->path, "has a data type that is not supported");
  memset(tensor, 0, sizeof *tensor);
  tensor->device.device_type = kDLCPU;
  tensor->dtype.code = codes[kind - kinds];
  tensor->dtype.bits = (uint8_t)(atoi(descr + 2) * 8);
  tensor->dtype.lanes = 1;
  tensor->shape = calloc(MAX_DIMS, sizeof(int64_t));
  for (char *at = (char *)shape + strlen("'shape': ("); *at && *at != ')';) {
    char *next = at;
    int64_t value = strtoll(at, &next, 10);
    if (next == at) { ++at; continue; }
    if (value < 0 || tensor->ndim == MAX_DIMS) fail(file->path, "has a bad shape");
    tensor->shape[tensor->ndim++] = value;
    at = next;
  }
  free(header);
  size_t bytes = bytes_of(tensor);
  if (prefix + length + bytes > left) fail(file->path, "is truncated");
  tensor->data = (char *)start + prefix + length;
  file->at += prefix + length + bytes;
}

static TVMFFIAny weight(File *file) {
  DLManagedTensor *managed = calloc(1, sizeof *managed);
  next_array(file, &managed->dl_tensor);
  TVMFFIAny any = {.type_index = kTVMFFITensor};
  if (make_tensor(managed, 0, 0, (TVMFFIObjectHandle *)&any.v_obj)) fail(file->path, "is not what the library takes");
  return any;
}

static void write_npy(const char *folder, int index, const DLTensor *tensor) {
  char path[4096], header[1024], shape[512] = "";
  snprintf(path, sizeof path, "%s/%d.npy", folder, index);
  FILE *file = fopen(path, "wb");
  if (!file) fail(path, "cannot be written");
  size_t at = 0;
  for (int axis = 0; axis < tensor->ndim && at < sizeof shape - 32; ++axis)
    at += (size_t)snprintf(shape + at, sizeof shape - at, "%lld, ", (long long)tensor->shape[axis]);
  uint8_t code = tensor->dtype.code;
  char kind = code == kDLInt ? 'i' : code == kDLUInt ? 'u' : code == kDLBool ? 'b' : 'f';
  int bytes = (tensor->dtype.bits + 7) / 8;
  int length = snprintf(header, sizeof header, "{'descr': '%c%c%d', 'fortran_order': False, 'shape': (%s), }",
                        bytes == 1 ? '|' : '<', kind, bytes, shape);
  int padded = (10 + length + 1 + 63) / 64 * 64 - 10;
  while (length < padded - 1) header[length++] = ' ';
  header[length++] = '\n';
  unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)(length & 255), (unsigned char)(length >> 8)};
  size_t total = bytes_of(tensor);
  int good = fwrite(start, 1, 10, file) == 10 && fwrite(header, 1, (size_t)length, file) == (size_t)length &&
             fwrite((char *)tensor->data + tensor->byte_offset, 1, total, file) == total;
  if (fclose(file) || !good) fail(path, "cannot be written");
}

static int ascending(const void *left, const void *right) {
  double difference = *(const double *)left - *(const double *)right;
  return (difference > 0) - (difference < 0);
}

static void time_runs(TVMFFIObjectHandle invoke, TVMFFIAny *name, int repeat) {
  double *times = calloc((size_t)repeat, sizeof(double));
  for (int run = 0; run < repeat; ++run) {
    struct timespec start, end;
    clock_gettime(CLOCK_MONOTONIC, &start);
    call("main", invoke, name, 1);
    clock_gettime(CLOCK_MONOTONIC, &end);
    times[run] = (double)(end.tv_sec - start.tv_sec) * 1e3 + (double)(end.tv_nsec - start.tv_nsec) / 1e6;
  }
  qsort(times, (size_t)repeat, sizeof(double), ascending);
  printf("median_ms %.6f\nmin_ms %.6f\nruns %d\n", times[repeat / 2], times[0], repeat);
}

int main(int argc, char **argv) {
  const char *threads = "0", *places[2] = {NULL, NULL};
  static DLTensor tensors[MAX_INPUTS];
  int inputs = 0, repeat = 0, place = 0;
  for (int i = 1; i < argc; ++i) {
    if (!strcmp(argv[i], "--threads") && i + 1 < argc) threads = argv[++i];
    else if (!strcmp(argv[i], "--repeat") && i + 1 < argc) repeat = atoi(argv[++i]);
    else if (place < 2) places[place++] = argv[i];
    else if (inputs == MAX_INPUTS) fail(argv[i], "too many inputs");
    else {
      File file = map(argv[i]);
      next_array(&file, &tensors[inputs++]);
    }
  }
  if (place < 2) fail("usage", "run BUNDLE OUTPUT_FOLDER [--threads N] [--repeat N] input0.npy ...");
  char cores[16];
  snprintf(cores, sizeof cores, "%ld", sysconf(_SC_NPROCESSORS_ONLN));
  setenv("TVM_BIND_THREADS", "0", 0);
  setenv("TVM_THREAD_POOL_SPIN_COUNT", "2000", 0); /* idle workers sleep after a millisecond or two */
  setenv("TVM_NUM_THREADS", atoi(threads) > 0 ? threads : cores, atoi(threads) > 0);

  void *ffi = load(places[0], "libtvm_ffi.so");
  load(places[0], "libtvm_runtime.so");
  *(void **)&get_global = dlsym(ffi, "TVMFFIFunctionGetGlobal");
  *(void **)&call_function = dlsym(ffi, "TVMFFIFunctionCall");
  *(void **)&move_error = dlsym(ffi, "TVMFFIErrorMoveFromRaised");
  *(void **)&make_tensor = dlsym(ffi, "TVMFFITensorFromDLPack");
  if (!get_global || !call_function || !move_error || !make_tensor) fail("libtvm_ffi.so", "lacks the C interface");
  module_get_function = global("ffi.ModuleGetFunction");

  char path[4096];
  snprintf(path, sizeof path, "%s/model.so", places[0]);
  TVMFFIAny library_args[1] = {text(path)};
  TVMFFIAny library = call(path, global("ffi.ModuleLoadFromFile"), library_args, 1);
  TVMFFIAny vm = call("vm_load_executable", method(library, "vm_load_executable"), NULL, 0);
  TVMFFIAny device[3] = {number(kDLCPU), number(0), number(2)}; /* 2: the allocator that reuses memory */
  call("vm_initialization", method(vm, "vm_initialization"), device, 3);

  snprintf(path, sizeof path, "%s/weights.npy", places[0]);
  File file = map(path);
  int count = 1 + inputs;
  TVMFFIAny *args = calloc((size_t)count + file.size / LEAST_RECORD, sizeof *args);
  args[0] = text("main");
  for (int i = 0; i < inputs; ++i) {
    args[i + 1].type_index = kTVMFFIDLTensorPtr;
    args[i + 1].v_ptr = &tensors[i];
  }
  while (file.at < file.size) args[count++] = weight(&file);
  call("inputs", method(vm, "set_input"), args, count);
  TVMFFIObjectHandle invoke = method(vm, "invoke_stateful"), get_output = method(vm, "get_output");
  call("main", invoke, args, 1);
  if (repeat > 0) time_runs(invoke, args, repeat);

  int64_t outputs = call("outputs", method(vm, "get_output_arity"), args, 1).v_int64;
  for (int64_t i = 0; i < (outputs < 0 ? 1 : outputs); ++i) {
    TVMFFIAny index[2] = {args[0], number(i)};
    TVMFFIAny output = call("outputs", get_output, index, outputs < 0 ? 1 : 2);
    if (output.type_index != kTVMFFITensor) fail("outputs", "one is not a tensor");
    write_npy(places[1], (int)i, (DLTensor *)((char *)output.v_obj + sizeof(TVMFFIObject)));
  }
  fflush(stdout);
  _Exit(0); /* the pool's threads need no farewell */
}
