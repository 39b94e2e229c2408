/* What the machine can do at best, without Python: copies, reads, page faults, and waking another process.
 *
 *   limits copy ROUNDS BYTES...     one line per figure and size:  name bytes sample_ns sample_ns ...
 *   limits wake ROUNDS              the same, with 0 bytes
 *
 * Copies go through glibc's memcpy, so that GLIBC_TUNABLES shows. Linux only.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SPINS = 20000 };

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static char *fresh(size_t bytes)
{
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("mmap");
    return p;
}

static volatile uint64_t sink;

static uint64_t read_whole(const char *p, size_t bytes)
{
    const uint64_t *words = (const uint64_t *)p;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i + 4 <= bytes / 8; i += 4) {
        a += words[i];
        b += words[i + 1];
        c += words[i + 2];
        d += words[i + 3];
    }
    return a + b + c + d;
}

static uint64_t touch(const char *p, size_t bytes)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < bytes; i += PAGE)
        sum += *(const volatile uint64_t *)(p + i);
    return sum;
}

/* A thread that copies one half. It waits spinning: a limit has no wake-up in it. */
static struct {
    _Atomic(int) state; /* 0 idle, 1 asked, 2 done, 3 end */
    char *to;
    const char *from;
    size_t bytes;
} half;

static void *helper(void *unused)
{
    (void)unused;
    for (;;) {
        int state = atomic_load_explicit(&half.state, memory_order_acquire);
        if (state == 3)
            return NULL;
        if (state == 1) {
            memcpy(half.to, half.from, half.bytes);
            atomic_store_explicit(&half.state, 2, memory_order_release);
        } else
            sched_yield();
    }
}

static void copy_in_two(char *to, const char *from, size_t bytes)
{
    size_t first = bytes / 2 / PAGE * PAGE;
    half.to = to + first;
    half.from = from + first;
    half.bytes = bytes - first;
    atomic_store_explicit(&half.state, 1, memory_order_release);
    memcpy(to, from, first);
    while (atomic_load_explicit(&half.state, memory_order_acquire) != 2)
        sched_yield();
    atomic_store_explicit(&half.state, 0, memory_order_release);
}

static void print(const char *name, size_t bytes, const int64_t *samples, int count)
{
    printf("%s %zu", name, bytes);
    for (int i = 0; i < count; i++)
        printf(" %lld", (long long)samples[i]);
    printf("\n");
}

static void copies(size_t bytes, int rounds)
{
    static const char *names[] = {"copy_warm_1", "copy_warm_2", "copy_fresh_memfd", "fault",
                                  "read_whole", "touch"};
    enum { KINDS = 6 };
    int64_t *samples = calloc((size_t)KINDS * rounds, sizeof *samples);
    char *from = fresh(bytes), *to = fresh(bytes);
    memset(from, 1, bytes);
    memset(to, 2, bytes);
    for (int round = -1; round < rounds; round++) {
        for (int kind = 0; kind < KINDS; kind++) {
            char *page = NULL;
            int fd = -1;
            if (kind == 3)
                page = fresh(bytes);
            int64_t start = now_ns();
            switch (kind) {
            case 0:
                memcpy(to, from, bytes);
                break;
            case 1:
                copy_in_two(to, from, bytes);
                break;
            case 2:
                fd = memfd_create("limits", MFD_CLOEXEC);
                if (fd < 0 || ftruncate(fd, (off_t)bytes))
                    die("memfd");
                page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (page == MAP_FAILED)
                    die("mmap of a memfd");
                memcpy(page, from, bytes);
                munmap(page, bytes);
                close(fd);
                break;
            case 3:
                for (size_t i = 0; i < bytes; i += PAGE)
                    page[i] = 1;
                break;
            case 4:
                sink += read_whole(to, bytes);
                break;
            case 5:
                sink += touch(to, bytes);
                break;
            }
            int64_t took = now_ns() - start;
            if (kind == 3)
                munmap(page, bytes);
            if (round >= 0)
                samples[kind * rounds + round] = took;
        }
    }
    for (int kind = 0; kind < KINDS; kind++)
        print(names[kind], bytes, samples + kind * rounds, rounds);
    munmap(from, bytes);
    munmap(to, bytes);
    free(samples);
}

static void futex_wait(_Atomic(uint32_t) *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic(uint32_t) *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

struct Line {
    _Atomic(uint32_t) ping;
    char pad[60];
    _Atomic(uint32_t) pong;
};

static void step(int kind, _Atomic(uint32_t) *mine, uint32_t until, int fd)
{
    uint64_t count;
    if (kind == 0) {
        int spins = 0;
        while (atomic_load_explicit(mine, memory_order_acquire) != until)
            if (++spins > SPINS) { /* with one processor, or a busy one */
                sched_yield();
                spins = 0;
            }
    } else if (kind == 1) {
        uint32_t seen;
        while ((seen = atomic_load_explicit(mine, memory_order_acquire)) != until)
            futex_wait(mine, seen);
    } else if (read(fd, &count, sizeof count) != sizeof count)
        die("read of an eventfd");
}

static void tell(int kind, _Atomic(uint32_t) *theirs, uint32_t value, int fd)
{
    uint64_t one = 1;
    if (kind == 2) {
        if (write(fd, &one, sizeof one) != sizeof one)
            die("write to an eventfd");
        return;
    }
    atomic_store_explicit(theirs, value, memory_order_release);
    if (kind == 1)
        futex_wake(theirs);
}

static void wakes(int rounds)
{
    static const char *names[] = {"wake_spin", "wake_futex", "wake_eventfd"};
    for (int kind = 0; kind < 3; kind++) {
        struct Line *line = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        int there = eventfd(0, EFD_CLOEXEC), back = eventfd(0, EFD_CLOEXEC);
        if (line == MAP_FAILED || there < 0 || back < 0)
            die("mmap or eventfd");
        int total = rounds + 20;
        pid_t parent = getpid(), child = fork();
        if (child < 0)
            die("fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() != parent)
                _exit(1);
            for (int i = 1; i <= total; i++) {
                step(kind, &line->ping, (uint32_t)i, there);
                tell(kind, &line->pong, (uint32_t)i, back);
            }
            _exit(0);
        }
        int64_t *samples = calloc((size_t)rounds, sizeof *samples);
        for (int i = 1; i <= total; i++) {
            int64_t start = now_ns();
            tell(kind, &line->ping, (uint32_t)i, there);
            step(kind, &line->pong, (uint32_t)i, back);
            if (i > 20)
                samples[i - 21] = now_ns() - start;
        }
        waitpid(child, NULL, 0);
        print(names[kind], 0, samples, rounds);
        free(samples);
        munmap(line, PAGE);
        close(there);
        close(back);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int rounds = atoi(argv[2]);
    if (rounds < 1)
        return 2;
    if (!strcmp(argv[1], "wake")) {
        wakes(rounds);
        return 0;
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, helper, NULL))
        die("pthread_create");
    for (int i = 3; i < argc; i++)
        copies((size_t)strtoull(argv[i], NULL, 10), rounds);
    atomic_store(&half.state, 3);
    pthread_join(thread, NULL);
    return 0;
}
