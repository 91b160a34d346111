/* Which processors threads are on, and how they come to others.
 *
 * Where threads compute on every processor, one of them is interrupted whenever another program wants
 * a processor, in the middle of whatever it does. The system does not soon move it to one that has
 * become free, nor one of two that have come to share a processor: what they work on is thought to be
 * still near the old one. Where the system cannot be asked, as anywhere but on Linux, threads stay
 * where they are and nobody counts as held up.
 */
#ifndef TUNESMITH_PROCESSORS_H
#define TUNESMITH_PROCESSORS_H

#include <stdint.h>

#ifdef __linux__
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

/* Longer than the clock needs to show that a thread has computed: about a microsecond. */
enum { GLANCE_SPINS = 100 };

typedef cpu_set_t Processors;

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

/* Have the caller run only where no other thread wants the processor; return whether it does. */
static int run_when_idle(void) {
    const struct sched_param none = {0};
    return !sched_setscheduler(0, SCHED_IDLE, &none);
}

/* Some monotonic time in nanoseconds. */
static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
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

/* The number of the processor that the caller runs on; negative if that cannot be told. */
static int this_processor(void) { return sched_getcpu(); }

/* The processors that the caller may run on; none if that cannot be told. */
static Processors allowed_processors(void) {
    Processors allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        CPU_ZERO(&allowed);
    return allowed;
}

static void leave_out(Processors *set, int processor) {
    if (processor >= 0 && processor < CPU_SETSIZE)
        CPU_CLR(processor, set);
}

/* Of some processors a single one, or none where it is not among them. */
static Processors only(const Processors *set, int processor) {
    Processors one;
    CPU_ZERO(&one);
    if (processor >= 0 && processor < CPU_SETSIZE && CPU_ISSET(processor, set))
        CPU_SET(processor, &one);
    return one;
}

/* Move a thread to one of some processors; later it may run on all `allowed`.
 *
 * Return whether it could be moved.
 */
static int move_to(const Thread *thread, const Processors *some, const Processors *allowed) {
    return CPU_COUNT(some) && !sched_setaffinity(thread->id, sizeof *some, some) &&
           !sched_setaffinity(thread->id, sizeof *allowed, allowed);
}

#else

typedef int Processors;
typedef int Thread;

static Thread this_thread(void) { return 0; }

static int run_when_idle(void) { return 0; }

static int64_t nanoseconds(void) { return 0; }

static int is_held_up(const Thread *thread) {
    (void)thread;
    return 0;
}

static int this_processor(void) { return -1; }

static Processors allowed_processors(void) { return 0; }

static void leave_out(Processors *set, int processor) { (void)set, (void)processor; }

static Processors only(const Processors *set, int processor) {
    (void)processor;
    return *set;
}

static int move_to(const Thread *thread, const Processors *some, const Processors *allowed) {
    (void)thread, (void)some, (void)allowed;
    return 0;
}

#endif

#endif
