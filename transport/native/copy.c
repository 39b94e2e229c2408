/* Copying large regions by two threads.
 *
 * The calling thread and one helper take pieces of the region in turns until none is left. So a helper that
 * gets no processor costs its wake-up and no more: nobody waits for a thread that has not begun. It sleeps in
 * between. It is started at the first copy, and again in a forked child. One copy at a time has it; others,
 * meanwhile, are made by their own threads alone.
 *
 * Pieces are small enough for the C library to copy them as it copies what fits a processor's cache, which is
 * faster than its way with large regions (glibc on AMD). Or they are streamed: written past the caches. Which of
 * the two is faster depends on the machine and the size, and is for the caller to find out. Nothing here knows
 * of Python.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define PIECE ((size_t)256 << 10)
#define LINE ((size_t)64)
#define SPINS 2000

/* The first version of the symbol, so that what was built here also runs with older C libraries. */
#if defined(__x86_64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver pthread_create,pthread_create@GLIBC_2.17");
#endif

static _Atomic int busy;       /* 1 while somebody's copy has the helper, who also owns what follows */
static int prepared, started;
static _Atomic int posted; /* counts the copies that the helper may take part in */
static _Atomic int open_to_help;
static _Atomic int inside; /* 1 while the helper may look at `work` */
static struct {
    char *to;
    const char *from;
    size_t bytes;
    int streamed;
    _Atomic size_t taken;
} work; /* written while nobody else is inside */

static void sleep_while(_Atomic int *word, int value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic int *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

#if defined(__SSE2__)
static void stream(char *to, const char *from, size_t bytes)
{
    size_t at = -(uintptr_t)to & (LINE - 1);
    if (at > bytes)
        at = bytes;
    memcpy(to, from, at);
    for (; at + LINE <= bytes; at += LINE) {
        const __m128i *source = (const __m128i *)(from + at);
        __m128i *target = (__m128i *)(to + at);
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    memcpy(to + at, from + at, bytes - at);
    _mm_sfence(); /* before anybody is told */
}
#else
#define stream memcpy
#endif

static void copy_piece(char *to, const char *from, size_t bytes, size_t at, int streamed)
{
    size_t left = bytes - at, size = left < PIECE ? left : PIECE;
    if (streamed)
        stream(to + at, from + at, size);
    else
        memcpy(to + at, from + at, size);
}

static void take_pieces(void)
{
    for (;;) {
        size_t at = atomic_fetch_add(&work.taken, PIECE);
        if (at >= work.bytes)
            return;
        copy_piece(work.to, work.from, work.bytes, at, work.streamed);
    }
}

static void *help(void *unused)
{
    int known = 0;
    for (;;) {
        int now;
        while ((now = atomic_load(&posted)) == known)
            sleep_while(&posted, known);
        known = now;
        atomic_store(&inside, 1);
        if (atomic_load(&open_to_help))
            take_pieces();
        atomic_store(&inside, 0);
        wake(&inside);
    }
    return unused;
}

static void after_fork_in_child(void)
{
    started = 0;
    atomic_store(&posted, 0);
    atomic_store(&open_to_help, 0);
    atomic_store(&inside, 0);
    atomic_store(&busy, 0);
}

static int start_helper(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    if (!prepared && pthread_atfork(NULL, NULL, after_fork_in_child))
        return 0;
    prepared = 1;
    if (pthread_attr_init(&attributes))
        return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* a program's signals are handled by its own threads */
    sigprocmask(SIG_SETMASK, &all, &before); /* this thread's, on Linux */
    started = !pthread_create(&thread, &attributes, help, NULL);
    sigprocmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return started;
}

static int copy_with_help(char *to, const char *from, size_t bytes, int streamed)
{
    if (!started && !start_helper())
        return 0;
    work.to = to, work.from = from, work.bytes = bytes, work.streamed = streamed;
    atomic_store(&work.taken, 0);
    atomic_store(&open_to_help, 1);
    atomic_fetch_add(&posted, 1);
    wake(&posted);
    take_pieces();
    atomic_store(&open_to_help, 0); /* who comes from now on takes nothing */
    for (int spins = 0; spins < SPINS && atomic_load(&inside); spins++)
        ;
    while (atomic_load(&inside))
        sleep_while(&inside, 1);
    return 1;
}

/* Copy between regions that don't overlap, `shared`: by two threads where possible. Whether it was. */
EXPORT int legion_copy(char *to, const char *from, size_t bytes, int shared, int streamed)
{
    int helped = 0;
    if (shared && !atomic_exchange(&busy, 1)) {
        helped = copy_with_help(to, from, bytes, streamed);
        atomic_store(&busy, 0);
    }
    for (size_t at = helped ? bytes : 0; at < bytes; at += PIECE)
        copy_piece(to, from, bytes, at, streamed);
    return helped;
}
