/* Threads that have work to do and no processor to do it on, and how they get one.
 *
 * Where threads compute on every processor, one of them is interrupted whenever another program wants
 * a processor, in the middle of whatever it does. The system does not soon move it to one that has
 * become free: what it works on is thought to be still near the old one. Where the system cannot be
 * asked, as anywhere but on Linux, nobody counts as held up.
 */
#ifndef TUNESMITH_HELD_UP_H
#define TUNESMITH_HELD_UP_H

#ifdef __linux__
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

/* Longer than the clock needs to show that a thread has computed: about a microsecond. */
enum { GLANCE_SPINS = 100 };

typedef struct {
    pid_t id;
    clockid_t clock; /* of the time that it has computed */
} Thread;

static Thread this_thread(void) {
    Thread own = {.id = gettid()};
    if (pthread_getcpuclockid(pthread_self(), &own.clock))
        own.clock = CLOCK_MONOTONIC; /* never stands still */
    return own;
}

/* Whether a thread that does not sleep stands still. */
static int is_held_up(const Thread *thread) {
    struct timespec before, after;
    if (clock_gettime(thread->clock, &before))
        return 0;
    for (int spin = 0; spin < GLANCE_SPINS; spin++)
        _mm_pause();
    return !clock_gettime(thread->clock, &after) && before.tv_sec == after.tv_sec &&
           before.tv_nsec == after.tv_nsec;
}

/* Move a thread to the caller's processor, unless it may not run there; it may leave it at once. */
static void bring_here(const Thread *thread) {
    cpu_set_t allowed, here;
    int processor = sched_getcpu();
    if (processor < 0 || processor >= CPU_SETSIZE)
        return;
    if (sched_getaffinity(thread->id, sizeof allowed, &allowed) || !CPU_ISSET(processor, &allowed))
        return;
    CPU_ZERO(&here);
    CPU_SET(processor, &here);
    if (!sched_setaffinity(thread->id, sizeof here, &here))
        sched_setaffinity(thread->id, sizeof allowed, &allowed);
}

#else

typedef int Thread;

static Thread this_thread(void) { return 0; }

static int is_held_up(const Thread *thread) {
    (void)thread;
    return 0;
}

static void bring_here(const Thread *thread) { (void)thread; }

#endif

#endif
