/* Large aligned allocations, born in shared memory: a preloaded shim around the C library's allocator.
 *
 * Owns the blocks inside of the regions that the process's Python side registered (segments of its arena,
 * mapped shared). posix_memalign, aligned_alloc and memalign of at least `min_bytes` are served from there,
 * best fit; whatever does not fit goes to the allocator behind us, and is counted. A block that is held was
 * published: it is used again only after it has been both freed by its owner and released by Python. A block
 * that was in use at a fork is never used again, for nobody here knows how long the child looks at it.
 *
 * It knows nothing of torch and nothing of Python. Without a region it only passes calls on. All metadata is in
 * private memory of this process. One mutex guards it all; nothing is allocated while it is held.
 *
 *     free extent ── allocate ──▶ used ── hold ──▶ used+held ── free ──▶ orphan ── release ──▶ free extent
 *                                  └── fork ──▶ used+forked ── free, release ──▶ spent, until its region is removed
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define HUGE_PAGE ((size_t)2 << 20)
#define REGIONS 256
#define EXTENTS_PER_CHUNK 1024
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#define EXPORT __attribute__((visibility("default")))

/* The first version of the symbol, so that what was built here also runs with older C libraries. */
#if defined(__x86_64__)
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver dlsym,dlsym@GLIBC_2.17");
#endif

enum { FREE = 0, USED = 1, ORPHAN = 2, SPENT = 3 };

typedef struct extent {
    struct extent *prev, *next; /* by address; neighbours of other regions are never merged */
    uintptr_t start;
    size_t span;   /* whole pages */
    size_t wanted; /* the bytes that were asked for */
    int state;
    int held;
    int isolated; /* mapped copy-on-write */
    int forked;   /* a forked child may be looking at it */
    int told;     /* an orphan that legion_born_orphans has named */
    int cold;     /* a free extent with pages that are not mapped yet */
    int region;
} extent;

typedef struct {
    uintptr_t start;
    size_t nbytes; /* 0: not in use */
    int fd;
    int shut; /* nothing is born here any more */
    uint64_t segment;
} region;

typedef struct {
    uint64_t segment, offset, wanted, start;
    uint32_t held, isolated;
} legion_block;

typedef struct {
    uint64_t total_bytes, live_bytes, blocks, missed_bytes, missed_largest;
} legion_numbers;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uintptr_t base; /* of the reserved addresses; set once, before `reserved` */
static size_t reserved;
static size_t min_bytes = (size_t)-1;
static int closed; /* in a forked child: nothing is handed out or taken back any more */
static region regions[REGIONS];
static extent *first, *spare;
static legion_numbers numbers;
static uint64_t orphans; /* not told yet; read without the lock */

static void (*next_free)(void *);
static void *(*next_realloc)(void *, size_t);
static int (*next_posix_memalign)(void **, size_t, size_t);
static void *(*next_memalign)(size_t, size_t);
static void *(*next_aligned_alloc)(size_t, size_t);
static size_t (*next_usable)(void *);

/* Before the constructor, one thread at most is here. dlsym itself may allocate and free. */
static void resolve(void) {
    static int resolving;
    if (resolving) return;
    resolving = 1;
    next_free = dlsym(RTLD_NEXT, "free");
    next_realloc = dlsym(RTLD_NEXT, "realloc");
    next_posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    next_memalign = dlsym(RTLD_NEXT, "memalign");
    next_aligned_alloc = dlsym(RTLD_NEXT, "aligned_alloc");
    next_usable = dlsym(RTLD_NEXT, "malloc_usable_size");
    resolving = 0;
}

/* Other threads free while the addresses are being reserved: they see none of them, or all. */
static inline int ours(const void *p) {
    size_t span = __atomic_load_n(&reserved, __ATOMIC_ACQUIRE);
    return (uintptr_t)p - base < span;
}

/* --- extents ------------------------------------------------------------------------------------------ */

static extent *take_spare(void) {
    if (!spare) {
        size_t nbytes = sizeof(extent) * EXTENTS_PER_CHUNK;
        extent *chunk = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (chunk == MAP_FAILED) return NULL;
        for (size_t i = 0; i < EXTENTS_PER_CHUNK; i++) {
            chunk[i].next = spare;
            spare = &chunk[i];
        }
    }
    extent *e = spare;
    spare = e->next;
    memset(e, 0, sizeof *e);
    return e;
}

static void unlink_extent(extent *e) {
    if (e->prev) e->prev->next = e->next; else first = e->next;
    if (e->next) e->next->prev = e->prev;
    e->next = spare;
    spare = e;
}

static void insert_after(extent *before, extent *e) {
    e->prev = before;
    e->next = before ? before->next : first;
    if (before) before->next = e; else first = e;
    if (e->next) e->next->prev = e;
}

static extent *holding(uintptr_t address) {
    for (extent *e = first; e && e->start <= address; e = e->next)
        if (address < e->start + e->span) return e->state == FREE || e->state == SPENT ? NULL : e;
    return NULL;
}

static int map_again(extent *e, int flags) {
    region *r = &regions[e->region];
    void *p = mmap((void *)e->start, e->span, PROT_READ | PROT_WRITE, flags | MAP_FIXED | MAP_NORESERVE, r->fd,
                   (off_t)(e->start - r->start));
    return p == MAP_FAILED ? -1 : 0;
}

static void merge_with_next(extent *e) {
    extent *n = e->next;
    if (n && n->state == FREE && n->region == e->region && n->start == e->start + e->span) {
        e->span += n->span;
        e->cold |= n->cold;
        unlink_extent(n);
    }
}

static void make_free(extent *e) {
    if (e->forked) {
        /* The pages of the segment are the child's to read; only what was written here is let go of. */
        mmap((void *)e->start, e->span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        e->state = SPENT;
        numbers.live_bytes -= e->span;
        numbers.blocks--;
        return;
    }
    if (e->isolated) {
        /* What was written into the private pages is dropped with them. A block whose mapping can't be made
         * shared again stays out of use. */
        if (map_again(e, MAP_SHARED) != 0) return;
        e->isolated = 0;
        e->cold = 1;
    }
    e->state = FREE;
    numbers.live_bytes -= e->span;
    numbers.blocks--;
    merge_with_next(e);
    if (e->prev && e->prev->state == FREE) merge_with_next(e->prev);
}

static void *allocate(size_t alignment, size_t nbytes) {
    if (nbytes < min_bytes || alignment > PAGE || nbytes > SIZE_MAX / 2) return NULL;
    size_t span = (nbytes + PAGE - 1) & ~(PAGE - 1);
    int cold = 0;
    extent *best = NULL;
    pthread_mutex_lock(&lock);
    if (!closed) {
        for (extent *e = first; e; e = e->next)
            if (e->state == FREE && e->span >= span && (!best || e->span < best->span) && !regions[e->region].shut)
                best = e;
        if (best && best->span > span) {
            extent *rest = take_spare();
            if (rest) {
                rest->start = best->start + span;
                rest->span = best->span - span;
                rest->region = best->region;
                rest->cold = best->cold;
                insert_after(best, rest);
                best->span = span;
            }
        }
        if (best) {
            cold = best->cold;
            best->cold = 0;
            best->wanted = nbytes;
            best->state = USED;
            numbers.live_bytes += best->span;
            numbers.blocks++;
        } else {
            numbers.missed_bytes += span;
            if (span > numbers.missed_largest) numbers.missed_largest = span;
        }
    }
    pthread_mutex_unlock(&lock);
    if (best && cold) {
        int saved = errno;
        madvise((void *)best->start, span, MADV_POPULATE_WRITE); /* a hint: else the pages fault one by one */
        errno = saved;
    }
    return best ? (void *)best->start : NULL;
}

static void give_back(void *p) {
    int saved = errno;
    pthread_mutex_lock(&lock);
    extent *e = closed ? NULL : holding((uintptr_t)p);
    if (e && e->state == USED) {
        if (e->held) {
            e->state = ORPHAN;
            e->told = 0;
            __atomic_fetch_add(&orphans, 1, __ATOMIC_RELAXED);
        } else {
            make_free(e);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = saved;
}

static size_t usable(void *p) {
    pthread_mutex_lock(&lock);
    extent *e = holding((uintptr_t)p);
    size_t nbytes = e ? e->start + e->span - (uintptr_t)p : 0;
    pthread_mutex_unlock(&lock);
    return nbytes;
}

/* --- what the program calls --------------------------------------------------------------------------- */

EXPORT int posix_memalign(void **out, size_t alignment, size_t nbytes) {
    if (nbytes >= min_bytes && alignment >= sizeof(void *) && !(alignment & (alignment - 1))) {
        void *p = allocate(alignment, nbytes);
        if (p) {
            *out = p;
            return 0;
        }
    }
    if (!next_posix_memalign) resolve();
    return next_posix_memalign(out, alignment, nbytes);
}

static void *power_aligned(size_t alignment, size_t nbytes) {
    if (nbytes < min_bytes || !alignment || (alignment & (alignment - 1))) return NULL;
    return allocate(alignment, nbytes);
}

EXPORT void *memalign(size_t alignment, size_t nbytes) {
    void *p = power_aligned(alignment, nbytes);
    if (p) return p;
    if (!next_memalign) resolve();
    return next_memalign(alignment, nbytes);
}

/* Not memalign for what it refuses: newer C libraries take powers of two alone here. */
EXPORT void *aligned_alloc(size_t alignment, size_t nbytes) {
    void *p = power_aligned(alignment, nbytes);
    if (p) return p;
    if (!next_aligned_alloc) resolve();
    return next_aligned_alloc(alignment, nbytes);
}

EXPORT void free(void *p) {
    if (ours(p)) {
        give_back(p);
        return;
    }
    if (!next_free) {
        resolve();
        if (!next_free) return; /* called while it is being looked up */
    }
    next_free(p);
}

/* Of C23: a C library that has them would take them for its own blocks. */
EXPORT void free_sized(void *p, size_t nbytes) {
    (void)nbytes;
    free(p);
}

EXPORT void free_aligned_sized(void *p, size_t alignment, size_t nbytes) {
    (void)alignment;
    (void)nbytes;
    free(p);
}

EXPORT void *realloc(void *p, size_t nbytes) {
    if (!p || !ours(p)) {
        if (!next_realloc) resolve();
        return next_realloc(p, nbytes);
    }
    if (!nbytes) {
        free(p);
        return NULL;
    }
    size_t had = usable(p);
    if (nbytes <= had && nbytes >= had / 2) return p;
    if (!next_realloc) resolve();
    void *moved = next_realloc(NULL, nbytes);
    if (moved) {
        memcpy(moved, p, nbytes < had ? nbytes : had);
        free(p);
    }
    return moved;
}

EXPORT void *reallocarray(void *p, size_t count, size_t size) {
    if (size && count > SIZE_MAX / size) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(p, count * size);
}

EXPORT size_t malloc_usable_size(void *p) {
    if (ours(p)) return usable(p);
    if (!next_usable) resolve();
    return next_usable(p);
}

/* --- forked children ---------------------------------------------------------------------------------- */

/* What is in use becomes copy-on-write here too: else the child, whose pages are those of the segment until it
 * writes them, would see what is written after the fork. */
static void before_fork(void) {
    pthread_mutex_lock(&lock);
    for (extent *e = first; e; e = e->next) {
        if (e->state != USED) continue;
        if (!e->isolated && map_again(e, MAP_PRIVATE) == 0) e->isolated = 1;
        e->forked = 1;
    }
}

static void after_fork_here(void) { pthread_mutex_unlock(&lock); }

/* The child keeps what it can see, copy-on-write as it expects; it allocates nothing here and frees nothing.
 * A process that forks before it has any region (a zygote) leaves its children free to have their own. */
static void after_fork_in_child(void) {
    if (first) {
        closed = 1;
        min_bytes = (size_t)-1;
        for (extent *e = first; e; e = e->next)
            if (e->state == USED && !e->isolated) map_again(e, MAP_PRIVATE);
    }
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void start(void) {
    resolve();
    pthread_atfork(before_fork, after_fork_here, after_fork_in_child);
}

/* --- what Python calls -------------------------------------------------------------------------------- */

EXPORT int legion_born_version(void) { return 3; }

/* Reserve addresses for all regions to come, once; 0, or an errno. */
EXPORT int legion_born_reserve(uint64_t nbytes) {
    if (base || sysconf(_SC_PAGESIZE) != (long)PAGE) return base ? EBUSY : ENOTSUP;
    nbytes = (nbytes + PAGE - 1) & ~(PAGE - 1);
    void *p = mmap(NULL, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return errno;
    pthread_mutex_lock(&lock);
    base = (uintptr_t)p;
    __atomic_store_n(&reserved, nbytes, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* Serve allocations from this size on; none with the largest value. */
EXPORT void legion_born_serve(uint64_t from_bytes) {
    pthread_mutex_lock(&lock);
    if (!closed) min_bytes = (size_t)from_bytes;
    pthread_mutex_unlock(&lock);
}

static uintptr_t to_huge_page(uintptr_t address) { return (address + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1); }

/* A region over the whole of a memfd, at the first gap that is large enough; 0, or an errno. It lies so that the
 * file's huge pages are mapped whole. */
EXPORT int legion_born_add(int fd, uint64_t nbytes, uint64_t segment) {
    int result = ENOSPC, slot = -1, own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (own < 0) return errno;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < REGIONS && slot < 0; i++)
        if (!regions[i].nbytes) slot = i;
    uintptr_t at = to_huge_page(base);
    for (int moved = 1; moved;) {
        moved = 0;
        for (int i = 0; i < REGIONS; i++)
            if (regions[i].nbytes && at < regions[i].start + regions[i].nbytes && regions[i].start < at + nbytes) {
                at = to_huge_page(regions[i].start + regions[i].nbytes);
                moved = 1;
            }
    }
    extent *e = slot >= 0 && !closed && at - base + nbytes <= reserved ? take_spare() : NULL;
    if (e) {
        regions[slot] = (region){at, nbytes, own, 0, segment};
        e->start = at;
        e->span = nbytes;
        e->region = slot;
        e->cold = 1;
        if (map_again(e, MAP_SHARED) != 0) {
            result = errno;
            regions[slot].nbytes = 0;
            e->next = spare;
            spare = e;
        } else {
            extent *before = NULL;
            for (extent *o = first; o && o->start < at; o = o->next) before = o;
            insert_after(before, e);
            numbers.total_bytes += nbytes;
            result = 0;
        }
    }
    pthread_mutex_unlock(&lock);
    if (result) close(own);
    return result;
}

static region *region_of(uint64_t segment) {
    for (int i = 0; i < REGIONS; i++)
        if (regions[i].nbytes && regions[i].segment == segment) return &regions[i];
    return NULL;
}

/* Let nothing more be born in a region; what lives there lives on. 0, or ENOENT. */
EXPORT int legion_born_shut(uint64_t segment) {
    pthread_mutex_lock(&lock);
    region *r = closed ? NULL : region_of(segment);
    if (r) r->shut = 1;
    pthread_mutex_unlock(&lock);
    return r ? 0 : ENOENT;
}

/* Give up a region in which nothing lives; 0, or EBUSY, ENOENT, or another errno. */
EXPORT int legion_born_remove(uint64_t segment) {
    int result = 0;
    pthread_mutex_lock(&lock);
    region *r = closed ? NULL : region_of(segment);
    if (!r) result = ENOENT;
    for (extent *e = first; e && !result; e = e->next)
        if (&regions[e->region] == r && (e->state == USED || e->state == ORPHAN)) result = EBUSY;
    if (!result) {
        void *p = mmap((void *)r->start, r->nbytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        if (p == MAP_FAILED) result = errno;
    }
    if (!result) {
        for (extent *e = first, *next; e; e = next) {
            next = e->next;
            if (&regions[e->region] == r) unlink_extent(e);
        }
        close(r->fd);
        numbers.total_bytes -= r->nbytes;
        r->nbytes = 0;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

/* The live block that holds an address; 0, or ENOENT. */
EXPORT int legion_born_find(uint64_t address, legion_block *out) {
    if (!ours((void *)(uintptr_t)address)) return ENOENT;
    pthread_mutex_lock(&lock);
    extent *e = closed ? NULL : holding((uintptr_t)address);
    if (e && e->state == USED) {
        region *r = &regions[e->region];
        *out = (legion_block){r->segment, e->start - r->start, e->wanted, e->start, (uint32_t)e->held,
                              (uint32_t)e->isolated};
    } else {
        e = NULL;
    }
    pthread_mutex_unlock(&lock);
    return e ? 0 : ENOENT;
}

/* Keep a live block out of use until `legion_born_release`, also when it is freed; 0, or ENOENT. */
EXPORT int legion_born_hold(uint64_t start) {
    pthread_mutex_lock(&lock);
    extent *e = closed ? NULL : holding((uintptr_t)start);
    int found = e && e->state == USED && e->start == start;
    if (found) e->held = 1;
    pthread_mutex_unlock(&lock);
    return found ? 0 : ENOENT;
}

EXPORT int legion_born_release(uint64_t start) {
    pthread_mutex_lock(&lock);
    extent *e = closed ? NULL : holding((uintptr_t)start);
    int found = e && e->held && e->start == start;
    if (found) {
        e->held = 0;
        if (e->state == ORPHAN) {
            if (!e->told) __atomic_fetch_sub(&orphans, 1, __ATOMIC_RELAXED);
            make_free(e);
        }
    }
    pthread_mutex_unlock(&lock);
    return found ? 0 : ENOENT;
}

/* The starts of blocks that their owner has freed while they were held, each told once; how many. */
EXPORT uint64_t legion_born_orphans(uint64_t *starts, uint64_t most) {
    uint64_t count = 0;
    if (!__atomic_load_n(&orphans, __ATOMIC_RELAXED)) return 0;
    pthread_mutex_lock(&lock);
    for (extent *e = closed ? NULL : first; e && count < most; e = e->next) {
        if (e->state != ORPHAN || e->told) continue;
        e->told = 1;
        starts[count++] = e->start;
    }
    __atomic_fetch_sub(&orphans, count, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&lock);
    return count;
}

/* Make a block copy-on-write for this process, if its owner still has it: nobody else sees its writes then.
 * 0: done, or needless, for it has been freed. An errno where it can't be. */
EXPORT int legion_born_isolate(uint64_t start) {
    int result = 0;
    pthread_mutex_lock(&lock);
    extent *e = closed ? NULL : holding((uintptr_t)start);
    if (!e) {
        result = ENOENT;
    } else if (e->state == USED && !e->isolated) {
        if (map_again(e, MAP_PRIVATE) == 0) e->isolated = 1;
        else result = errno;
    }
    pthread_mutex_unlock(&lock);
    return result;
}

/* The figures; those of what did not fit start again. */
EXPORT void legion_born_numbers(legion_numbers *out) {
    pthread_mutex_lock(&lock);
    *out = numbers;
    numbers.missed_bytes = numbers.missed_largest = 0;
    pthread_mutex_unlock(&lock);
}
