/* What the shim must withstand: threads, odd sizes, realloc, frees while held, forks. Ends with 0 or says what is not so. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define CHECK(what) do { if (!(what)) { fprintf(stderr, "line %d: %s\n", __LINE__, #what); _exit(1); } } while (0)

typedef struct { uint64_t segment, offset, wanted, start; uint32_t held, isolated; } block;
typedef struct { uint64_t total_bytes, live_bytes, blocks, missed_bytes, missed_largest; } figures;
int legion_born_reserve(uint64_t);
void legion_born_serve(uint64_t);
int legion_born_add(int, uint64_t, uint64_t);
int legion_born_remove(uint64_t);
int legion_born_find(uint64_t, block *);
int legion_born_hold(uint64_t);
int legion_born_release(uint64_t);
int legion_born_isolate(uint64_t);
int legion_born_shut(uint64_t);
uint64_t legion_born_orphans(uint64_t *, uint64_t);
void legion_born_numbers(figures *);

static int fds[2];

static unsigned char *make(size_t nbytes, int mark) {
    void *p = NULL;
    CHECK(posix_memalign(&p, 64, nbytes) == 0);
    CHECK(malloc_usable_size(p) >= nbytes);
    memset(p, mark, nbytes);
    return p;
}

static int born(void *p) {
    block b;
    return legion_born_find((uint64_t)(uintptr_t)p, &b) == 0;
}

static int whole(const unsigned char *p, size_t nbytes, int mark) {
    for (size_t i = 0; i < nbytes; i += 509)
        if (p[i] != mark) return 0;
    return p[nbytes - 1] == mark;
}

static void *worker(void *number) {
    unsigned seed = 17u * (unsigned)(uintptr_t)number + 1;
    unsigned char *mine[6] = {0};
    size_t sizes[6] = {0};
    for (int round = 0; round < 400; round++) {
        int i = rand_r(&seed) % 6, mark = 1 + rand_r(&seed) % 255;
        size_t nbytes = MIB / 2 + (size_t)rand_r(&seed) % (4 * MIB);
        if (mine[i]) {
            unsigned char was = mine[i][0];
            CHECK(whole(mine[i], sizes[i], was));
            if (round % 3 == 0) {
                mine[i] = realloc(mine[i], nbytes);
                CHECK(mine[i] && whole(mine[i], nbytes < sizes[i] ? nbytes : sizes[i], was));
                memset(mine[i], was, nbytes);
                sizes[i] = nbytes;
                continue;
            }
            free(mine[i]);
        }
        mine[i] = make(nbytes, mark);
        sizes[i] = nbytes;
    }
    for (int i = 0; i < 6; i++) free(mine[i]);
    return NULL;
}

static void threads(void) {
    pthread_t all[4];
    figures f;
    for (uintptr_t i = 0; i < 4; i++) CHECK(pthread_create(&all[i], NULL, worker, (void *)i) == 0);
    for (int i = 0; i < 4; i++) CHECK(pthread_join(all[i], NULL) == 0);
    legion_born_numbers(&f);
    CHECK(f.live_bytes == 0 && f.blocks == 0 && f.total_bytes == 40 * MIB);
    CHECK(f.missed_bytes > 0); /* some did not fit, and went elsewhere */
}

static void held(void) {
    unsigned char *p = make(8 * MIB, 5), *q;
    block b;
    figures f;
    CHECK(legion_born_find((uint64_t)(uintptr_t)p + 12345, &b) == 0);
    CHECK(b.start == (uint64_t)(uintptr_t)p && b.wanted == 8 * MIB && !b.held);
    CHECK(legion_born_hold(b.start) == 0);
    free(p);
    CHECK(!born(p)); /* its owner has it no more */
    for (int i = 0; i < 20; i++) {
        q = make(8 * MIB, 9);
        CHECK(q != p);
        free(q);
    }
    CHECK(whole(p, 8 * MIB, 5)); /* who looks at it sees what was sent */
    CHECK(legion_born_remove(b.segment) != 0);
    CHECK(legion_born_release(b.start) == 0 && legion_born_release(b.start) != 0);
    legion_born_numbers(&f);
    CHECK(f.live_bytes == 0);
    q = make(8 * MIB, 1);
    CHECK(q == p); /* and now it is used again */
    free(q);
    q = realloc(make(2 * MIB, 3), 6 * MIB);
    CHECK(whole(q, 2 * MIB, 3) && !born(q)); /* grown beyond its block: moved to the heap */
    free(q);
    q = make(2 * MIB, 3);
    CHECK(realloc(q, 3 * MIB / 2) == q && born(q));
    CHECK(realloc(q, 0) == NULL);
}

static void isolated(void) {
    unsigned char *p = make(2 * MIB, 7);
    block b;
    CHECK(legion_born_find((uint64_t)(uintptr_t)p, &b) == 0);
    unsigned char *other = mmap(NULL, b.wanted, PROT_READ, MAP_SHARED, fds[b.segment], (off_t)b.offset);
    CHECK(other != MAP_FAILED && whole(other, b.wanted, 7));
    CHECK(legion_born_hold(b.start) == 0 && legion_born_isolate(b.start) == 0);
    memset(p, 8, b.wanted);
    CHECK(whole(other, b.wanted, 7) && whole(p, b.wanted, 8));
    free(p);
    CHECK(whole(other, b.wanted, 7));
    CHECK(legion_born_release(b.start) == 0);
    unsigned char *again = make(2 * MIB, 9);
    CHECK(again == p && whole(other, b.wanted, 9)); /* shared once more */
    free(again);
    munmap(other, b.wanted);
}

static void forked(void) {
    unsigned char *p = make(3 * MIB, 4), *sent = make(2 * MIB, 5), *q;
    int status = 0, go[2];
    char byte = 0;
    block b;
    figures f;
    CHECK(legion_born_find((uint64_t)(uintptr_t)sent, &b) == 0 && legion_born_hold(b.start) == 0);
    CHECK(pipe(go) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        CHECK(read(go[0], &byte, 1) == 1);
        CHECK(whole(p, 3 * MIB, 4)); /* what its parent has written, freed and made since is not its affair */
        CHECK(whole(sent, 2 * MIB, 5));
        memset(p, 6, 3 * MIB);
        q = make(3 * MIB, 6);
        CHECK(!born(q));
        free(q);
        p = realloc(p, 9 * MIB);
        CHECK(whole(p, 3 * MIB, 6));
        free(p);
        free(sent);
        _exit(0);
    }
    CHECK(born(p) && whole(p, 3 * MIB, 4));
    memset(p, 7, 3 * MIB);
    memset(sent, 7, 2 * MIB);
    CHECK(whole(p, 3 * MIB, 7));
    free(p);
    free(sent);
    CHECK(legion_born_release(b.start) == 0);
    for (int i = 0; i < 20; i++) {
        size_t nbytes = (1 + (size_t)i % 8) * MIB;
        q = make(nbytes, 9);
        CHECK(q + nbytes <= p || q >= p + 3 * MIB); /* never there again */
        free(q);
    }
    CHECK(write(go[1], &byte, 1) == 1);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    close(go[0]);
    close(go[1]);
    legion_born_numbers(&f);
    CHECK(f.live_bytes == 0 && f.blocks == 0);
}

static void orphans(void) {
    unsigned char *p = make(2 * MIB, 1), *q = make(2 * MIB, 2);
    uint64_t starts[4] = {0};
    CHECK(legion_born_orphans(starts, 4) == 0);
    CHECK(legion_born_hold((uint64_t)(uintptr_t)p) == 0 && legion_born_hold((uint64_t)(uintptr_t)q) == 0);
    CHECK(legion_born_orphans(starts, 4) == 0);
    free(p);
    free(q);
    CHECK(legion_born_orphans(starts, 1) == 1 && legion_born_orphans(starts + 1, 3) == 1); /* each once */
    CHECK(starts[0] != starts[1] && legion_born_orphans(starts, 4) == 0);
    CHECK(legion_born_release((uint64_t)(uintptr_t)p) == 0 && legion_born_release((uint64_t)(uintptr_t)q) == 0);
    p = make(2 * MIB, 1);
    CHECK(legion_born_hold((uint64_t)(uintptr_t)p) == 0);
    free(p);
    CHECK(legion_born_release((uint64_t)(uintptr_t)p) == 0); /* before anybody was told */
    CHECK(legion_born_orphans(starts, 4) == 0);
}

static void shut(void) {
    unsigned char *p = make(4 * MIB, 3), *q;
    block b;
    CHECK(legion_born_find((uint64_t)(uintptr_t)p, &b) == 0);
    CHECK(legion_born_shut(b.segment) == 0 && legion_born_shut(99) == ENOENT);
    q = make(4 * MIB, 4);
    CHECK(whole(p, 4 * MIB, 3));
    block other;
    CHECK(legion_born_find((uint64_t)(uintptr_t)q, &other) != 0 || other.segment != b.segment);
    CHECK(legion_born_remove(b.segment) == EBUSY);
    free(p);
    free(q);
    CHECK(legion_born_remove(b.segment) == 0);
    CHECK(legion_born_add(fds[b.segment], 20 * MIB, b.segment) == 0);
}

/* What the C library answers is not for the shim to change. `refused`: what it says of an alignment of 3. */
static void odd_requests(int refused) {
    volatile size_t huge = SIZE_MAX;
    void *p = (void *)&p;
    CHECK(posix_memalign(&p, 3, 2 * MIB) == EINVAL && posix_memalign(&p, 4, 2 * MIB) == EINVAL);
    CHECK(p == (void *)&p);
    CHECK(posix_memalign(&p, 64, huge - 4096) == ENOMEM && posix_memalign(&p, 64, huge / 2) == ENOMEM);
    CHECK(!memalign(64, huge - 64) && !reallocarray(NULL, huge / 2, 4));
    p = aligned_alloc(3, 2 * MIB);
    CHECK((p == NULL) == refused);
    free(p);
    p = aligned_alloc(64, 2 * MIB);
    CHECK(born(p) && (uintptr_t)p % 64 == 0);
    CHECK(!reallocarray(p, huge / 2, 4) && born(p)); /* it is still there */
    free(p);
    CHECK(posix_memalign(&p, 2 * MIB, 2 * MIB) == 0 && !born(p) && (uintptr_t)p % (2 * MIB) == 0);
    free(p);
    CHECK(posix_memalign(&p, 64, 0) == 0);
    free(p);
    free(NULL);
    p = valloc(3 * MIB);
    CHECK(malloc_usable_size(p) >= 3 * MIB && malloc_usable_size(NULL) == 0);
    p = realloc(p, 5 * MIB);
    free(p);
    p = calloc(3, MIB);
    CHECK(whole(p, 3 * MIB, 0));
    free(p);
    p = make(2 * MIB, 1);
    errno = 77;
    free(p);
    CHECK(errno == 77);
}

int main(void) {
    void *libc = dlopen("libc.so.6", RTLD_NOW);
    CHECK(libc);
    void *(*libcs_own)(size_t, size_t) = dlsym(libc, "aligned_alloc");
    void *three = libcs_own(3, 1000);
    int refused = three == NULL;
    free(three);
    CHECK(!born(make(4 * MIB, 1)));
    CHECK(legion_born_reserve((uint64_t)1 << 36) == 0 && legion_born_reserve(4096) != 0);
    for (int i = 0; i < 2; i++) {
        fds[i] = memfd_create("region", MFD_CLOEXEC);
        CHECK(fds[i] >= 0 && ftruncate(fds[i], (off_t)(20 * MIB)) == 0);
        CHECK(legion_born_add(fds[i], 20 * MIB, (uint64_t)i) == 0);
    }
    legion_born_serve(MIB);
    odd_requests(refused);
    threads();
    held();
    isolated();
    orphans();
    shut();
    forked();
    CHECK(legion_born_remove(0) == 0 && legion_born_remove(0) != 0 && legion_born_remove(1) == 0);
    CHECK(!born(make(4 * MIB, 1)));
    CHECK(legion_born_add(fds[1], 20 * MIB, 7) == 0); /* the addresses are used again */
    unsigned char *p = make(4 * MIB, 2);
    CHECK(born(p));
    free(p);
    return 0;
}
