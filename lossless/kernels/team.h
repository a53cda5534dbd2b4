/* How the threads of a parallel region wait for each other.

   libgomp's threads turn round for milliseconds before they sleep. Where two of them share a processor, because other programs have the rest, each
   wait is a time slice then; a pass waits some two hundred times, and was a hundred times as slow. Here a thread turns round for as long as waits
   take on a quiet machine, and sleeps from then on. */

#pragma once
#include <omp.h>
#include <stdint.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define TURNS 4000 /* some hundred microseconds */

struct team { /* of one region; begins as {0} */
    int arrived, asleep;
    uint32_t meeting; /* the number of the next one */
};

static inline void turn_round(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Every thread of the region calls this; 1 in the one that comes last, for whom the others wait until it calls `go_on`, and 0 in those. */
static inline int comes_last(struct team *team) {
    uint32_t meeting = __atomic_load_n(&team->meeting, __ATOMIC_RELAXED); /* of those that are here none has ended it */
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) return 1;
    for (int i = 0; i < TURNS; i++) {
        if (__atomic_load_n(&team->meeting, __ATOMIC_ACQUIRE) != meeting) return 0;
        turn_round();
    }
    __atomic_add_fetch(&team->asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&team->meeting, __ATOMIC_SEQ_CST) == meeting) {
#if defined(__linux__)
        syscall(SYS_futex, &team->meeting, FUTEX_WAIT_PRIVATE, meeting, NULL, NULL, 0); /* back at once if the meeting has ended */
#else
        sched_yield();
#endif
    }
    __atomic_sub_fetch(&team->asleep, 1, __ATOMIC_SEQ_CST);
    return 0;
}

static inline void go_on(struct team *team) {
    __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&team->meeting, 1, __ATOMIC_SEQ_CST);
#if defined(__linux__)
    if (__atomic_load_n(&team->asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, &team->meeting, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* What follows is done once all threads have come, by the last of them; the others go on behind it. Nothing may leave it but its end. */
#define BY_ONE(team) for (int last = comes_last(team); last; last = 0, go_on(team))

/* At the end of a region, too: there the first thread would wait for the others in libgomp's way. */
static inline void wait_for_all(struct team *team) {
    BY_ONE(team);
}
