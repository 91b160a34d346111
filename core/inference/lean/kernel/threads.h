/* A team of threads that goes through the phases of a step together.
 *
 * Within a phase the tasks are taken one by one from a common counter, so that a thread that the
 * system holds up delays the others by no more than its present task. Between phases all wait for
 * each other, at first awake; between steps the team sleeps.
 */
#ifndef TUNESMITH_THREADS_H
#define TUNESMITH_THREADS_H

#include <immintrin.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

/* Awake for some ten microseconds, longer than a task; whoever is late then was held up. */
enum { SPINS = 2000, LINE = 64 };

typedef struct Team Team;
typedef void (*Program)(Team *team, int member, void *argument);

typedef struct {
    _Atomic int next;
    char apart[LINE - sizeof(int)];
} Counter;

struct Team {
    int size;
    pthread_t *threads;
    pthread_mutex_t lock;
    pthread_cond_t wake, all_here;
    int round; /* of programs; under the lock */
    int ending;
    Program program;
    void *argument;
    _Atomic int arrived;
    _Atomic int meetings;
    _Atomic int sleepers;
    Counter counters[2]; /* of the present phase, and of the next one */
};

typedef struct {
    Team *team;
    int number;
} Member;

static inline int next_task(Team *team, int phase) {
    return atomic_fetch_add_explicit(&team->counters[phase & 1].next, 1, memory_order_relaxed);
}

/* End a phase: return when all members have come. */
static inline void meet(Team *team, int phase) {
    int meetings = atomic_load_explicit(&team->meetings, memory_order_relaxed);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == team->size) {
        /* Nobody takes tasks now; the counter is used again two phases on. */
        atomic_store_explicit(&team->counters[phase & 1].next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store(&team->meetings, meetings + 1);
        if (atomic_load(&team->sleepers)) {
            pthread_mutex_lock(&team->lock);
            pthread_cond_broadcast(&team->all_here);
            pthread_mutex_unlock(&team->lock);
        }
        return;
    }
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&team->meetings, memory_order_acquire) != meetings)
            return;
        _mm_pause();
    }
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add(&team->sleepers, 1);
    while (atomic_load(&team->meetings) == meetings)
        pthread_cond_wait(&team->all_here, &team->lock);
    atomic_fetch_sub(&team->sleepers, 1);
    pthread_mutex_unlock(&team->lock);
}

static void *member_main(void *given) {
    Member own = *(Member *)given;
    free(given);
    Team *team = own.team;
    for (int seen = 0;;) {
        pthread_mutex_lock(&team->lock);
        while (team->round == seen && !team->ending)
            pthread_cond_wait(&team->wake, &team->lock);
        seen = team->round;
        int ending = team->ending;
        pthread_mutex_unlock(&team->lock);
        if (ending)
            return NULL;
        team->program(team, own.number, team->argument);
        meet(team, 0);
    }
}

/* Have every member, the caller being the first, go through a program; it returns after the last. */
static void run_together(Team *team, Program program, void *argument) {
    atomic_store(&team->counters[0].next, 0);
    atomic_store(&team->counters[1].next, 0);
    pthread_mutex_lock(&team->lock);
    team->program = program;
    team->argument = argument;
    team->round++;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    program(team, 0, argument);
    meet(team, 0);
}

static void end_team(Team *team) {
    pthread_mutex_lock(&team->lock);
    team->ending = 1;
    pthread_cond_broadcast(&team->wake);
    pthread_mutex_unlock(&team->lock);
    for (int i = 1; i < team->size; i++)
        pthread_join(team->threads[i], NULL);
    pthread_cond_destroy(&team->wake);
    pthread_cond_destroy(&team->all_here);
    pthread_mutex_destroy(&team->lock);
    free(team->threads);
    free(team);
}

/* Return a team, smaller than wanted where the system gives no more threads; NULL without memory. */
static Team *make_team(int size) {
    Team *team = calloc(1, sizeof *team);
    pthread_t *threads = calloc((size_t)size, sizeof *threads);
    if (!team || !threads) {
        free(team);
        free(threads);
        return NULL;
    }
    team->threads = threads;
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->wake, NULL);
    pthread_cond_init(&team->all_here, NULL);
    for (team->size = 1; team->size < size; team->size++) {
        Member *member = malloc(sizeof *member);
        if (!member)
            break;
        *member = (Member){team, team->size};
        if (pthread_create(&threads[team->size], NULL, member_main, member)) {
            free(member);
            break;
        }
    }
    return team;
}

#endif
