/* A team of threads that goes through the phases of a step together.
 *
 * Within a phase the tasks are taken one by one from a common counter, and the phase is over when
 * all of them are done, whoever did them: a thread that the system holds up between two phases holds
 * up nobody. One that is held up within a task is brought to the processor of a thread that could
 * only wait for it, and one that falls behind is brought to a processor that nobody uses. Between
 * steps the team sleeps.
 */
#ifndef TUNESMITH_THREADS_H
#define TUNESMITH_THREADS_H

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "processors.h"

/* Awake for some ten microseconds, longer than a task; whoever is late then was held up. */
enum { SPINS = 2000 };

/* In phases: how often it is looked whether somebody falls behind, and from when on that counts. */
enum { LOOK_EACH = 4, BEHIND = 2 };

/* In nanoseconds: how long a processor must have been idle to take a thread that has fallen behind,
 * and how long the one who looks after that may be interrupted without noticing it.
 */
enum { QUIET = 1000 * 1000, GLANCE = 20 * 1000 };

/* The phase of a member that has not yet come in: behind whoever goes through the first one. */
enum { CALLED = -BEHIND };

typedef struct Team Team;
typedef void (*Program)(Team *team, int member, void *argument);

/* How many tasks are taken, and how many are done. */
typedef struct {
    _Atomic int taken, done;
} Phase;

typedef struct {
    Team *team;
    int number;
    pthread_t thread;
    Thread known; /* to the system */
    _Atomic int idle;
    _Atomic int phase;     /* that it goes through, or CALLED */
    _Atomic int processor; /* that it was last seen on */
} Member;

struct Team {
    int size, most_phases;
    Member *members; /* the first one is whoever calls */
    Phase *phases;
    _Atomic int over; /* phases */
    _Atomic int inside; /* members that go through the program, the first one not counted */
    _Atomic int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t wake, news, ask;
    Processors allowed; /* to whoever made the team */
    Thread watcher_known; /* to the system */
    int has_watcher;
    _Atomic int is_watched; /* the watcher is known */
    _Atomic int watching;   /* it was asked and has not made an end of it */
    _Atomic int open; /* for members to come in */
    /* Under the lock. */
    Program program;
    void *argument;
    int round; /* of programs */
    int ready; /* members that wait for a round, or are in one */
    int ending;
    int is_left; /* by all but the watcher */
};

typedef int (*Condition)(Team *team, int phase);

static int is_over(Team *team, int phase) { return atomic_load(&team->over) > phase; }

static int all_have_left(Team *team, int phase) {
    (void)phase;
    return !atomic_load(&team->inside);
}

/* Wake those that sleep because a condition did not hold. */
static void tell(Team *team) {
    if (!atomic_load(&team->sleepers))
        return;
    pthread_mutex_lock(&team->lock);
    pthread_cond_broadcast(&team->news);
    pthread_mutex_unlock(&team->lock);
}

/* Move a member to the caller's processor, unless it may not run there; it may leave it at once. */
static void bring_here(Member *member) {
    const Processors *allowed = &member->team->allowed;
    Processors here = only(allowed, this_processor());
    (void)move_to(&member->known, &here, allowed);
}

/* Note where a member is. */
static void note_place(Member *own, int phase) {
    atomic_store_explicit(&own->phase, phase, memory_order_relaxed);
    atomic_store_explicit(&own->processor, this_processor(), memory_order_relaxed);
}

/* The processors on which no member computes. */
static Processors free_processors(Team *team, int phase) {
    Processors rest = team->allowed;
    for (int i = 0; i < team->size; i++)
        if (phase - atomic_load(&team->members[i].phase) < BEHIND)
            leave_out(&rest, atomic_load(&team->members[i].processor));
    return rest;
}

/* A member that has fallen behind the others, who go through a phase; NULL if there is none. */
static Member *straggler(Team *team, int phase) {
    for (int i = 0; i < team->size && atomic_load(&team->open); i++)
        if (phase - atomic_load(&team->members[i].phase) >= BEHIND)
            return &team->members[i];
    return NULL;
}

/* Have it looked for a processor for those that have fallen behind.
 *
 * Each of them could go on, as what it may have slept for is over. Perhaps it is behind the caller,
 * on the same processor, and the system leaves it there although another one is idle.
 */
static void look_after(Team *team, int phase) {
    if (!atomic_load(&team->is_watched) || atomic_load(&team->watching) || !straggler(team, phase))
        return;
    Processors rest = free_processors(team, phase);
    if (!move_to(&team->watcher_known, &rest, &rest))
        return;
    pthread_mutex_lock(&team->lock);
    atomic_store(&team->watching, 1);
    pthread_cond_signal(&team->ask);
    pthread_mutex_unlock(&team->lock);
}

/* Bring a straggler to the caller's processor, once nobody else has used that for a while.
 *
 * What API and clients do for a token takes many short turns, and whoever comes between them makes
 * them wait.
 */
static void watch(Team *team) {
    int64_t since = nanoseconds(), seen = since;
    for (Member *late; (late = straggler(team, atomic_load(&team->over)));) {
        int64_t now = nanoseconds();
        if (now - seen > GLANCE)
            since = now;
        seen = now;
        if (now - since >= QUIET) {
            bring_here(late);
            return;
        }
        _mm_pause();
    }
}

static void free_team(Team *team) {
    pthread_cond_destroy(&team->wake);
    pthread_cond_destroy(&team->news);
    pthread_cond_destroy(&team->ask);
    pthread_mutex_destroy(&team->lock);
    free(team->members);
    free(team->phases);
    free(team);
}

/* The last one to leave the team: nobody waits for it, as it may wait long for a processor. */
static void *watcher_main(void *given) {
    Team *team = given;
    int is_able = run_when_idle();
    team->watcher_known = this_thread();
    atomic_store(&team->is_watched, is_able);
    for (;;) {
        pthread_mutex_lock(&team->lock);
        while (!team->is_left && !atomic_load(&team->watching))
            pthread_cond_wait(&team->ask, &team->lock);
        int is_left = team->is_left;
        pthread_mutex_unlock(&team->lock);
        if (is_left)
            break;
        watch(team);
        atomic_store(&team->watching, 0);
    }
    free_team(team);
    return NULL;
}

/* Lend the processor to another member, if there is one that has work to do and none to do it on. */
static void lend_processor(Team *team, int number) {
    for (int i = 0; i < team->size; i++) {
        Member *other = &team->members[i];
        if (i != number && !atomic_load(&other->idle) && is_held_up(&other->known)) {
            bring_here(other);
            return;
        }
    }
}

/* Return when a condition holds; first awake, then asleep. */
static void wait_until(Team *team, int number, Condition holds, int phase) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (holds(team, phase))
            return;
        _mm_pause();
    }
    atomic_store(&team->members[number].idle, 1);
    lend_processor(team, number);
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (!holds(team, phase))
        pthread_cond_wait(&team->news, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
    atomic_store(&team->members[number].idle, 0);
}

/* The next task of a phase; a number past the last one if all are taken. */
static inline int next_task(Team *team, int phase) {
    return atomic_fetch_add_explicit(&team->phases[phase].taken, 1, memory_order_relaxed);
}

/* Note how many of a phase's tasks a member has done, and return when all are. */
static inline void end_phase(Team *team, int number, int phase, int done, int tasks) {
    if (done && atomic_fetch_add(&team->phases[phase].done, done) + done == tasks) {
        atomic_store(&team->over, phase + 1);
        tell(team);
    } else if (tasks)
        wait_until(team, number, is_over, phase);
    note_place(&team->members[number], phase + 1);
    if (phase % LOOK_EACH == 0)
        look_after(team, phase + 1);
}

static void *member_main(void *given) {
    Member *own = given;
    Team *team = own->team;
    pthread_mutex_lock(&team->lock);
    own->known = this_thread();
    team->ready++;
    pthread_cond_broadcast(&team->news);
    pthread_mutex_unlock(&team->lock);
    for (int seen = 0;;) {
        pthread_mutex_lock(&team->lock);
        while (!team->ending && (!atomic_load(&team->open) || team->round == seen))
            pthread_cond_wait(&team->wake, &team->lock);
        seen = team->round;
        int ending = team->ending;
        if (!ending)
            atomic_fetch_add(&team->inside, 1);
        pthread_mutex_unlock(&team->lock);
        if (ending)
            return NULL;
        note_place(own, 0);
        atomic_store(&own->idle, 0);
        team->program(team, own->number, team->argument);
        atomic_store(&own->idle, 1);
        atomic_fetch_sub(&team->inside, 1);
        tell(team);
    }
}

static void open_round(Team *team, int open) {
    pthread_mutex_lock(&team->lock);
    atomic_store(&team->open, open);
    if (open) {
        team->round++;
        pthread_cond_broadcast(&team->wake);
    }
    pthread_mutex_unlock(&team->lock);
}

/* Have members go through a program, the caller being the first of them.
 *
 * Whoever wakes too late to find anything to do stays out; it returns when nobody is inside.
 */
static void run_together(Team *team, Program program, void *argument) {
    memset(team->phases, 0, (size_t)team->most_phases * sizeof *team->phases);
    atomic_store(&team->over, 0);
    for (int i = 1; i < team->size; i++)
        atomic_store(&team->members[i].phase, CALLED);
    team->members[0].known = this_thread();
    note_place(&team->members[0], 0);
    team->program = program;
    team->argument = argument;
    open_round(team, 1);
    program(team, 0, argument);
    open_round(team, 0);
    wait_until(team, 0, all_have_left, 0);
}

static void end_team(Team *team) {
    pthread_mutex_lock(&team->lock);
    team->ending = 1;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->size; i++)
        pthread_join(team->members[i].thread, NULL);
    if (!team->has_watcher) {
        free_team(team);
        return;
    }
    pthread_mutex_lock(&team->lock);
    team->is_left = 1;
    pthread_cond_signal(&team->ask);
    pthread_mutex_unlock(&team->lock);
}

/* Return a team, smaller than wanted where the system gives no more threads; NULL without memory.
 *
 * Its programs have at most so many phases.
 */
static Team *make_team(int size, int most_phases) {
    Team *team = calloc(1, sizeof *team);
    Member *members = calloc((size_t)size, sizeof *members);
    Phase *phases = calloc((size_t)most_phases, sizeof *phases);
    if (!team || !members || !phases) {
        free(team);
        free(members);
        free(phases);
        return NULL;
    }
    team->members = members;
    team->phases = phases;
    team->most_phases = most_phases;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    pthread_cond_init(&team->news, NULL);
    pthread_cond_init(&team->ask, NULL);
    members[0].team = team;
    team->allowed = allowed_processors();
    for (team->size = 1; team->size < size; team->size++) {
        Member *member = &members[team->size];
        member->team = team;
        member->number = team->size;
        member->idle = 1;
        if (pthread_create(&member->thread, NULL, member_main, member))
            break;
    }
    pthread_mutex_lock(&team->lock);
    while (team->ready < team->size - 1)
        pthread_cond_wait(&team->news, &team->lock);
    pthread_mutex_unlock(&team->lock);
    return team;
}

/* Have a team's stragglers looked after, which takes a thread. */
static void watch_over(Team *team) {
    pthread_t watcher;
    team->has_watcher = team->size > 1 && !pthread_create(&watcher, NULL, watcher_main, team);
    if (team->has_watcher)
        pthread_detach(watcher);
}

#endif
