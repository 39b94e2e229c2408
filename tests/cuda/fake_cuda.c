/* An emulated CUDA driver for tests: device memory is shared files in $FAKE_CUDA_DIR, mapped where it is used.
 *
 * It keeps the rules that the real one has: calls need a current context, memory belongs to who allocated it, a
 * handle cannot be opened by its exporter, an address must be one that was given out. In the folder:
 *   devices          UUIDs as 32 hexadecimal digits, one a line, of all processes
 *   fail             lines "CALL CODE": that call fails so; "cuIpcOpenMemHandle_v2 corrupt" opens other memory
 *   limit            bytes that each process may allocate
 *   init-PID         made when a process initializes the driver
 *   context-PID      made with its first context
 *   memory-PID-N     one allocation
 *   open-PID-memory-PID-N    it is open in that process
 *   violation        written when memory is freed that a living process has open
 * $FAKE_CUDA_HIDDEN set: no device in this process.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int Result;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, OPERATING_SYSTEM = 304, CORRUPT = -7 };
#define DEVICES 8
#define REGIONS 4096
#define DEPTH 16

typedef struct { char bytes[64]; } Handle;
typedef struct { unsigned char bytes[16]; } Uuid;
typedef struct { char *address; size_t nbytes; int opened; char name[64]; } Region;

static Region regions[REGIONS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int contexts[DEVICES], initialized, made;
static size_t allocated;
static __thread void *stack[DEPTH];
static __thread int depth;

static void path_of(char *path, const char *name) {
    const char *folder = getenv("FAKE_CUDA_DIR");
    snprintf(path, 512, "%s/%s", folder ? folder : "/nonexistent", name);
}

static FILE *file_of(const char *name, const char *mode) {
    char path[512];
    path_of(path, name);
    return fopen(path, mode);
}

static Result failing(const char *call) {
    char name[80], code[32];
    Result result = OK;
    FILE *file = file_of("fail", "r");
    if (!file) return OK;
    while (fscanf(file, "%79s %31s", name, code) == 2)
        if (!strcmp(name, call)) result = strcmp(code, "corrupt") ? atoi(code) : CORRUPT;
    fclose(file);
    return result;
}

#define ENTER()                                                   \
    Result injected = failing(__func__);                          \
    if (injected > 0) return injected;                            \
    if (!initialized) return NOT_INITIALIZED
#define IN_CONTEXT() ENTER(); if (!depth) return INVALID_CONTEXT

static int devices(Uuid *uuids) {
    char line[80];
    int count = 0;
    FILE *file = getenv("FAKE_CUDA_HIDDEN") ? NULL : file_of("devices", "r");
    if (!file) return 0;
    while (count < DEVICES && fscanf(file, "%79s", line) == 1) {
        for (int i = 0; uuids && i < 16; i++) {
            unsigned byte;
            sscanf(line + 2 * i, "%2x", &byte);
            uuids[count].bytes[i] = (unsigned char)byte;
        }
        count++;
    }
    fclose(file);
    return count;
}

Result cuInit(unsigned flags) {
    Result result = failing("cuInit");
    if (result) return result;
    char name[48];
    snprintf(name, sizeof name, "init-%d", (int)getpid());
    FILE *file = file_of(name, "a");
    if (file) fclose(file);
    initialized = 1;
    return flags ? INVALID_VALUE : OK;
}

Result cuDriverGetVersion(int *version) { ENTER(); *version = 12040; return OK; }
Result cuDeviceGetCount(int *count) { ENTER(); *count = devices(NULL); return OK; }

Result cuDeviceGet(int *device, int ordinal) {
    ENTER();
    if (ordinal < 0 || ordinal >= devices(NULL)) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}

Result cuDeviceGetUuid(Uuid *uuid, int device) {
    Uuid all[DEVICES];
    ENTER();
    if (device < 0 || device >= devices(all)) return INVALID_DEVICE;
    *uuid = all[device];
    return OK;
}

Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    ENTER();
    if (device < 0 || device >= devices(NULL)) return INVALID_DEVICE;
    *flags = 0;
    *active = contexts[device] > 0;
    return OK;
}

Result cuDevicePrimaryCtxRetain(void **context, int device) {
    char name[48];
    ENTER();
    if (device < 0 || device >= devices(NULL)) return INVALID_DEVICE;
    if (!contexts[device]++) {
        snprintf(name, sizeof name, "context-%d", (int)getpid());
        FILE *file = file_of(name, "a");
        if (file) fclose(file);
    }
    *context = &contexts[device];
    return OK;
}

Result cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER();
    if (device < 0 || device >= DEVICES || !contexts[device]) return INVALID_CONTEXT;
    contexts[device]--;
    return OK;
}

Result cuCtxPushCurrent_v2(void *context) {
    ENTER();
    if (!context || depth == DEPTH) return INVALID_CONTEXT;
    stack[depth++] = context;
    return OK;
}

Result cuCtxPopCurrent_v2(void **context) {
    ENTER();
    if (!depth) return INVALID_CONTEXT;
    *context = stack[--depth];
    return OK;
}

Result cuCtxGetCurrent(void **context) {
    ENTER();
    *context = depth ? stack[depth - 1] : NULL;
    return OK;
}

static Region *free_region(void) {
    for (int i = 0; i < REGIONS; i++)
        if (!regions[i].address) return &regions[i];
    return NULL;
}

static Region *region_at(uint64_t address, size_t nbytes) {
    for (int i = 0; i < REGIONS; i++) {
        char *start = regions[i].address;
        if (start && (char *)address >= start && (char *)address + nbytes <= start + regions[i].nbytes)
            return &regions[i];
    }
    return NULL;
}

static char *map_file(const char *name, size_t *nbytes, int create) {
    char path[512];
    struct stat status;
    path_of(path, name);
    int fd = open(path, O_RDWR | O_CLOEXEC | (create ? O_CREAT | O_EXCL : 0), 0600);
    if (fd < 0) return NULL;
    if (create ? ftruncate(fd, (off_t)*nbytes) : fstat(fd, &status)) {
        close(fd);
        return NULL;
    }
    if (!create) *nbytes = (size_t)status.st_size;
    char *address = mmap(NULL, *nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return address == MAP_FAILED ? NULL : address;
}

Result cuMemAlloc_v2(uint64_t *address, size_t nbytes) {
    size_t limit = 0;
    IN_CONTEXT();
    FILE *file = file_of("limit", "r");
    if (file) {
        if (fscanf(file, "%zu", &limit) != 1) limit = 0;
        fclose(file);
    }
    if (!nbytes) return INVALID_VALUE;
    pthread_mutex_lock(&lock);
    Region *region = free_region();
    Result result = OUT_OF_MEMORY;
    if (region && !(limit && allocated + nbytes > limit)) {
        snprintf(region->name, sizeof region->name, "memory-%d-%d", (int)getpid(), ++made);
        region->nbytes = nbytes;
        region->opened = 0;
        region->address = map_file(region->name, &region->nbytes, 1);
        if (region->address) {
            allocated += nbytes;
            *address = (uint64_t)region->address;
            result = OK;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static int lives(int pid) {
    char path[64], state = 'Z';
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (fscanf(file, "%*d %*s %c", &state) != 1) state = 'Z';
    fclose(file);
    return state != 'Z';
}

static void check_unused(const char *name) {
    const char *name_of = getenv("FAKE_CUDA_DIR");
    DIR *folder = name_of ? opendir(name_of) : NULL;
    struct dirent *entry;
    int pid, used;
    while (folder && (entry = readdir(folder))) {
        if (sscanf(entry->d_name, "open-%d-%n", &pid, &used) == 1 && !strcmp(entry->d_name + used, name) &&
            lives(pid)) {
            FILE *file = file_of("violation", "a");
            if (file) {
                fprintf(file, "%s was freed while process %d had it open\n", name, pid);
                fclose(file);
            }
        }
    }
    if (folder) closedir(folder);
}

Result cuMemFree_v2(uint64_t address) {
    char path[512];
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    Region *region = region_at(address, 1);
    Result result = INVALID_VALUE;
    if (region && !region->opened && (uint64_t)region->address == address) {
        check_unused(region->name);
        path_of(path, region->name);
        unlink(path);
        munmap(region->address, region->nbytes);
        allocated -= region->nbytes;
        region->address = NULL;
        result = OK;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

Result cuIpcGetMemHandle(Handle *handle, uint64_t address) {
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    Region *region = region_at(address, 1);
    memset(handle, 0, sizeof *handle);
    if (region && !region->opened) snprintf(handle->bytes, sizeof handle->bytes, "FAKE%.58s", region->name);
    pthread_mutex_unlock(&lock);
    return region && !region->opened ? OK : INVALID_VALUE;
}

static void mark_open(const char *name, int open_now) {
    char mark[128], path[512];
    snprintf(mark, sizeof mark, "open-%d-%s", (int)getpid(), name);
    path_of(path, mark);
    if (!open_now) {
        unlink(path);
        return;
    }
    FILE *file = fopen(path, "a");
    if (file) fclose(file);
}

Result cuIpcOpenMemHandle_v2(uint64_t *address, Handle handle, unsigned flags) {
    int pid;
    IN_CONTEXT();
    if (flags != 1 || memcmp(handle.bytes, "FAKE", 4) || memchr(handle.bytes, 0, 64) == NULL) return INVALID_VALUE;
    if (sscanf(handle.bytes, "FAKEmemory-%d-", &pid) != 1) return INVALID_VALUE;
    if (pid == (int)getpid()) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    Region *region = free_region();
    Result result = OPERATING_SYSTEM;
    if (region) {
        region->opened = 1;
        snprintf(region->name, sizeof region->name, "%s", handle.bytes + 4);
        region->address = map_file(region->name, &region->nbytes, 0);
        if (region->address && injected == CORRUPT) {
            munmap(region->address, region->nbytes);
            region->address = mmap(NULL, region->nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        }
        if (region->address) {
            *address = (uint64_t)region->address;
            mark_open(region->name, 1);
            result = OK;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}

Result cuIpcCloseMemHandle(uint64_t address) {
    IN_CONTEXT();
    pthread_mutex_lock(&lock);
    Region *region = region_at(address, 1);
    Result result = INVALID_VALUE;
    if (region && region->opened && (uint64_t)region->address == address) {
        mark_open(region->name, 0);
        munmap(region->address, region->nbytes);
        region->address = NULL;
        result = OK;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

Result cuStreamCreate(void **stream, unsigned flags) {
    IN_CONTEXT();
    *stream = malloc(1);
    return flags == 1 ? OK : INVALID_VALUE;
}

Result cuStreamDestroy_v2(void *stream) { IN_CONTEXT(); free(stream); return OK; }
Result cuStreamSynchronize(void *stream) { IN_CONTEXT(); return stream ? OK : INVALID_VALUE; }

Result cuMemcpyHtoDAsync_v2(uint64_t target, const void *source, size_t nbytes, void *stream) {
    IN_CONTEXT();
    if (!stream || !region_at(target, nbytes)) return INVALID_VALUE;
    memcpy((void *)target, source, nbytes);
    return OK;
}

Result cuMemcpyDtoHAsync_v2(void *target, uint64_t source, size_t nbytes, void *stream) {
    IN_CONTEXT();
    if (!stream || !region_at(source, nbytes)) return INVALID_VALUE;
    memcpy(target, (void *)source, nbytes);
    return OK;
}

static const struct { Result code; const char *name, *text; } errors[] = {
    {OK, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {OPERATING_SYSTEM, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

static Result word_of(Result code, const char **word, int text) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) {
            *word = text ? errors[i].text : errors[i].name;
            return OK;
        }
    *word = NULL;
    return INVALID_VALUE;
}

Result cuGetErrorName(Result code, const char **name) { return word_of(code, name, 0); }
Result cuGetErrorString(Result code, const char **text) { return word_of(code, text, 1); }
