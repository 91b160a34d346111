/* A team of threads that goes through the phases of a step together.
 *
 * Within a phase the tasks are taken one by one from a common counter, and the phase is over when
 * all of them are done, whoever did them: a thread that the system holds up between two phases holds
 * up nobody. One that is held up within a task changes places with a thread that could only wait for
 * it, and one that falls behind is sent where no other computes. Between steps the team sleeps.
 */
#ifndef TUNESMITH_THREADS_H
#define TUNESMITH_THREADS_H

#include <immintrin.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "processors.h"

/* Awake for some ten microseconds, longer than a task; whoever is late then was held up. */
enum { SPINS = 2000 };

/* In phases: how often it is looked whether somebody falls behind, and from when on that counts. */
enum { LOOK_EACH = 4, BEHIND = 2 };

/* How often one waits as long as that before one sleeps. */
enum { PATIENCE = 8 };

/* A member that has not yet come in, and one that has left, as if it was before or behind all phases. */
enum { CALLED = -BEHIND, OUTSIDE = INT_MAX };

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
    _Atomic int phase;     /* that it goes through, or CALLED, or OUTSIDE */
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
    pthread_cond_t wake, news;
    Processors allowed; /* in this round */
    /* Under the lock. */
    Program program;
    void *argument;
    int round; /* of programs */
    int open; /* for members to come in */
    int ready; /* members that wait for a round, or are in one */
    int ending;
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

static void move_member(Member *member, const Processors *some) {
    move_to(&member->known, some, &member->team->allowed);
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

/* Send those that have fallen behind where nobody computes.
 *
 * Each of them could go on, as what it may have slept for is over. Perhaps it is behind the caller,
 * on the same processor. If it is somewhere else, it stays there.
 */
static void spread(Team *team, int phase) {
    for (int i = 0; i < team->size; i++)
        if (phase - atomic_load_explicit(&team->members[i].phase, memory_order_relaxed) >= BEHIND) {
            Processors rest = free_processors(team, phase);
            move_member(&team->members[i], &rest);
        }
}

/* Another member that has no processor to do its work on; NULL if there is none.
 *
 * Those that sleep as they wait for a phase have no work, except when all phases are over.
 */
static Member *held_up_member(Team *team, int number, int with_idle) {
    for (int i = 0; i < team->size; i++) {
        Member *other = &team->members[i];
        int phase = atomic_load(&other->phase);
        if (i != number && phase != OUTSIDE && (with_idle || !atomic_load(&other->idle)) &&
            is_held_up(&other->known))
            return other;
    }
    return NULL;
}

/* Whether a condition holds soon. */
static int holds_soon(Team *team, Condition holds, int phase) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (holds(team, phase))
            return 1;
        _mm_pause();
    }
    return holds(team, phase);
}

static void sleep_until(Team *team, int number, Condition holds, int phase) {
    Member *own = &team->members[number];
    atomic_store(&own->idle, 1);
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (!holds(team, phase))
        pthread_cond_wait(&team->news, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
    atomic_store(&own->idle, 0);
}

/* Give the caller's processor to another member; most often that interrupts the caller. */
static void lend_processor(Member *other) {
    int here = this_processor();
    Processors target = only(&other->team->allowed, here);
    move_member(other, &target);
    atomic_store(&other->processor, here);
}

/* Give one's own processor to another member, and go to the one where that waited.
 *
 * Unless that has made an end of the phase by then.
 */
static void change_places(Member *own, Member *other, int phase) {
    Team *team = own->team;
    int here = this_processor(), there = atomic_load(&other->processor);
    lend_processor(other);
    if (is_over(team, phase))
        return;
    Processors target = only(&team->allowed, there);
    if (there == here) {
        target = team->allowed;
        leave_out(&target, here);
    }
    move_member(own, &target);
}

/* Return when a phase is over. */
static void wait_for_others(Team *team, int number, int phase) {
    for (int patience = PATIENCE; !holds_soon(team, is_over, phase);) {
        Member *other = held_up_member(team, number, 0);
        if (other)
            change_places(&team->members[number], other, phase);
        else if (!patience--) {
            sleep_until(team, number, is_over, phase);
            return;
        }
    }
}

/* Give one's own processor, after the last phase, to the first member if that waits for one. */
static void call_back(Member *own) {
    Member *first = &own->team->members[0];
    if (atomic_load(&first->phase) < atomic_load(&own->phase) && is_held_up(&first->known))
        lend_processor(first);
}

/* Return when the caller is the only one in the program. */
static void wait_for_leaving(Team *team) {
    for (int patience = PATIENCE; !holds_soon(team, all_have_left, 0);) {
        Member *other = held_up_member(team, 0, 1);
        if (other)
            lend_processor(other);
        else if (!patience--) {
            sleep_until(team, 0, all_have_left, 0);
            return;
        }
    }
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
        wait_for_others(team, number, phase);
    note_place(&team->members[number], phase + 1);
    if (phase % LOOK_EACH == 0)
        spread(team, phase + 1);
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
        while (!team->ending && (!team->open || team->round == seen))
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
        call_back(own);
        atomic_store(&own->phase, OUTSIDE);
        atomic_store(&own->idle, 1);
        atomic_fetch_sub(&team->inside, 1);
        tell(team);
    }
}

static void open_round(Team *team, int open) {
    pthread_mutex_lock(&team->lock);
    team->open = open;
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
    team->allowed = allowed_processors();
    for (int i = 1; i < team->size; i++)
        atomic_store(&team->members[i].phase, CALLED);
    team->members[0].known = this_thread();
    note_place(&team->members[0], 0);
    team->program = program;
    team->argument = argument;
    open_round(team, 1);
    program(team, 0, argument);
    open_round(team, 0);
    wait_for_leaving(team);
}

static void end_team(Team *team) {
    pthread_mutex_lock(&team->lock);
    team->ending = 1;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->size; i++)
        pthread_join(team->members[i].thread, NULL);
    pthread_cond_destroy(&team->wake);
    pthread_cond_destroy(&team->news);
    pthread_mutex_destroy(&team->lock);
    free(team->members);
    free(team->phases);
    free(team);
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
    members[0].team = team;
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

#endif
