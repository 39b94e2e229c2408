/* Copying large regions by two threads.
 *
 * The calling thread and one helper take pieces of the region in turns until none is left. So a helper that
 * gets no processor costs its wake-up and no more: nobody waits for a thread that has not begun. It sleeps in
 * between. It is started at the first copy, and again in a forked child. One copy at a time has it; others,
 * meanwhile, are made by their own threads alone.
 *
 * Pieces are small enough for the C library to copy them as it copies what fits a processor's cache, which is
 * faster than its way with large regions (glibc on AMD). Nothing here knows of Python.
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

#define EXPORT __attribute__((visibility("default")))
#define PIECE ((size_t)256 << 10)
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

static void copy_piece(char *to, const char *from, size_t bytes, size_t at)
{
    size_t left = bytes - at;
    memcpy(to + at, from + at, left < PIECE ? left : PIECE);
}

static void take_pieces(void)
{
    for (;;) {
        size_t at = atomic_fetch_add(&work.taken, PIECE);
        if (at >= work.bytes)
            return;
        copy_piece(work.to, work.from, work.bytes, at);
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

static int copy_with_help(char *to, const char *from, size_t bytes)
{
    if (!started && !start_helper())
        return 0;
    work.to = to, work.from = from, work.bytes = bytes;
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
EXPORT int legion_copy(char *to, const char *from, size_t bytes, int shared)
{
    int helped = 0;
    if (shared && !atomic_exchange(&busy, 1)) {
        helped = copy_with_help(to, from, bytes);
        atomic_store(&busy, 0);
    }
    for (size_t at = helped ? bytes : 0; at < bytes; at += PIECE)
        copy_piece(to, from, bytes, at);
    return helped;
}
