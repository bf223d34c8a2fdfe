/* Two local caches of one replica, and a mapping that may raise. README.md says what is modelled.
 *
 * In promise.pml an invalidation is applied in one step. Here it takes many, and other threads act between any two: a
 * thread that loads, and a thread that reads without the lock. Messages arrive in order and are never lost; an echo is
 * back when all messages accepted before it have been handled. Log, reconnect and replay are in promise.pml.
 */

/* THREADS: one cache, one key, and the thread that reads without the lock. Else two caches, two keys, and none. */
#ifndef MESSAGES
#define MESSAGES 2
#endif
#ifndef RAISES
#define RAISES 1 /* how often the mapping of cache 0 raises when an entry is removed */
#endif

/* How old a value is: as in promise.pml. */
#define NONE 0
#define FRESH 1
#define STALE 2
#define DUE 3
#define BROKEN 4

mtype = { everything, a_and_b, b, a };
#define NAMES(keys) (keys)
#define EVERYTHING 4 /* entries are dead at once, and removed later by the sweep */
#define CONCERNS(keys, k) ((keys) == EVERYTHING || ((keys) & (1 << (k))))

typedef Cache {
    byte mapping[2];  /* values by key, in the user's mapping */
    bit is_dead[2];   /* a read that takes the lock does not serve it */
    byte recorded[2]; /* the history: the stamp of the last invalidation of a key */
    byte stamp;
    bit is_slow;      /* the fast path is closed: reads take the lock */
    bit is_locked
}
Cache cache[2];

chan wire = [MESSAGES] of { byte };
byte messages = MESSAGES;
byte raises = RAISES;
byte accepted, position, head;
bit is_leased;

#ifdef REACH
bit has_happened, has_happened_at_t0, has_happened_at_lease;
#define HAPPENS(fault) if :: fault == REACH -> has_happened = 1 :: else fi
#else
#define HAPPENS(fault) skip
#endif
#define A_RAISE 1
#define A_CLEAR 2
#define A_FAST_HIT 3

byte load, load_cache, load_key, token;
byte hit, hit_cache, hit_key, hit_stamp;

#define OUTDATE(value) if :: value == FRESH -> value = STALE :: else fi
#define CHANGE(value, from, to) if :: value == from -> value = to :: else fi
#define CHANGE_EACH(from, to) \
    CHANGE(cache[0].mapping[0], from, to); CHANGE(cache[0].mapping[1], from, to); \
    CHANGE(cache[1].mapping[0], from, to); CHANGE(cache[1].mapping[1], from, to); \
    CHANGE(load, from, to); CHANGE(hit, from, to)

inline outdate(k) {
    OUTDATE(cache[0].mapping[k]);
    OUTDATE(cache[1].mapping[k]);
    if :: load_key == k -> OUTDATE(load) :: else fi;
    if :: hit_key == k -> OUTDATE(hit) :: else fi
}

/* --- publisher --------------------------------------------------------------------------------------------------- */

#define PUBLISHES(keys) \
    :: d_step { messages > 0 -> \
        messages--; accepted++; \
        printf("publisher: an invalidation of %e is accepted\n", NAMES(keys)); \
        if :: CONCERNS(keys, 0) -> outdate(0) :: else fi; \
        if :: CONCERNS(keys, 1) -> outdate(1) :: else fi; \
        wire!keys }

active proctype publisher() {
end:
    do
    PUBLISHES(1)
#ifndef THREADS
    PUBLISHES(2)
    PUBLISHES(3)
#endif
    PUBLISHES(EVERYTHING)
    od
}

/* --- the subscriber's task --------------------------------------------------------------------------------------- */

inline record(i, k) {
    if :: CONCERNS(keys, k) -> cache[i].recorded[k] = stamp :: else fi
}

#define KILL(i) \
    if :: cache[i].mapping[0] != NONE -> cache[i].is_dead[0] = 1 :: else fi; \
    if :: cache[i].mapping[1] != NONE -> cache[i].is_dead[1] = 1 :: else fi

/* Remove one entry from the mapping: that may raise. */
inline remove(i, k) {
    if
    :: has_raised || keys == EVERYTHING || !CONCERNS(keys, k) || cache[i].mapping[k] == NONE
    :: !has_raised && keys != EVERYTHING && CONCERNS(keys, k) && cache[i].mapping[k] != NONE ->
        if
        :: d_step { true -> cache[i].mapping[k] = NONE; cache[i].is_dead[k] = 0 }
        :: d_step { i == 0 && raises > 0 -> raises--; has_raised = 1; HAPPENS(A_RAISE);
            printf("mapping: raises in cache 0 when %e is removed\n", NAMES(1 << k)) }
        fi
    fi
}

inline touch(i) {
    if :: keys == EVERYTHING -> d_step { KILL(i) } :: else fi;
#ifdef NAME_BY_NAME
    if :: !has_raised -> record(i, 0) :: else fi;
    remove(i, 0);
    if :: !has_raised -> record(i, 1) :: else fi;
    remove(i, 1)
#else
    remove(i, 0);
    remove(i, 1)
#endif
}

#define CLOSE(i) if :: keys == EVERYTHING -> cache[i].is_slow = 1 :: else fi
#define RECORD(i) d_step { record(i, 0); record(i, 1) }

inline apply(i) {
    atomic { !cache[i].is_locked -> cache[i].is_locked = 1 }
    stamp = cache[i].stamp + 1;
    has_raised = 0;
    printf("subscriber: applies %e to cache %d\n", NAMES(keys), i);
#ifdef STAMP_FIRST
    cache[i].stamp = stamp;
#endif
#if !defined(NAME_BY_NAME) && !defined(NAMES_LAST)
    RECORD(i);
#endif
#ifndef CLOSED_LAST
    CLOSE(i);
#endif
    touch(i);
#ifdef NAMES_LAST
    if :: !has_raised -> RECORD(i) :: else fi;
#endif
#ifdef WITHOUT_FINALLY
    if :: has_raised :: else -> cache[i].stamp = stamp fi;
#else
    cache[i].stamp = stamp;
#endif
#ifdef CLOSED_LAST
    CLOSE(i);
#endif
#ifndef WITHOUT_CLEAR
    if
    :: has_raised -> /* the same for everything: nothing of the user's mapping is called */
        printf("subscriber: clears cache %d\n", i);
        HAPPENS(A_CLEAR);
        d_step { stamp = stamp + 1; cache[i].recorded[0] = stamp; cache[i].recorded[1] = stamp }
        cache[i].is_slow = 1;
        d_step { KILL(i) }
        cache[i].stamp = stamp
    :: else
    fi;
#endif
    cache[i].is_locked = 0
}

#define SWEEP_ONE(i, k) if :: cache[i].is_dead[k] -> cache[i].mapping[k] = NONE; cache[i].is_dead[k] = 0 :: else fi
#define SWEEP(i) SWEEP_ONE(i, 0); SWEEP_ONE(i, 1); cache[i].is_slow = 0; printf("subscriber: sweeps cache %d\n", i)

active proctype subscriber() {
    byte keys, stamp;
    bit has_raised, is_echo_sent;
end:
    do
    :: wire?keys ->
#ifdef OLD_C4
        position++;
#endif
        apply(0);
#ifdef THREADS
        skip;
#elif defined(OLD_C4) || defined(WITHOUT_OTHER_CACHES)
        if :: !has_raised -> apply(1) :: else fi;
#else
        apply(1);
#endif
#ifndef OLD_C4
        position++;
#endif
        d_step { keys = 0; stamp = 0; has_raised = 0 }
    :: d_step { !is_echo_sent ->
        printf("subscriber: sends an echo (t0)\n");
        is_echo_sent = 1; head = accepted;
        CHANGE_EACH(STALE, DUE);
#ifdef REACH
        has_happened_at_t0 = has_happened;
#endif
        }
    :: d_step { is_echo_sent && position >= head ->
        printf("subscriber: coherent as of the moment the echo was sent\n");
        is_echo_sent = 0; head = 0; is_leased = 1;
        CHANGE_EACH(DUE, BROKEN);
#ifdef REACH
        has_happened_at_lease = has_happened_at_t0;
#endif
        }
    /* The sweep opens the fast path again. */
    :: d_step { cache[0].is_slow && !cache[0].is_locked -> SWEEP(0) }
    :: d_step { cache[1].is_slow && !cache[1].is_locked -> SWEEP(1) }
    od
}

/* --- a thread that loads ----------------------------------------------------------------------------------------- */

#define LOADS(i, k) :: d_step { true -> load_cache = i; load_key = k; token = cache[i].stamp }

active proctype loader() {
end:
    do
    :: if
        LOADS(0, 0)
#ifndef THREADS
        LOADS(0, 1)
        LOADS(1, 0)
        LOADS(1, 1)
#endif
        fi;
        d_step { load = FRESH; printf("loader: reads %e for cache %d from the source\n", NAMES(1 << load_key), load_cache) }
        d_step { !cache[load_cache].is_locked ->
            if
            :: token != cache[load_cache].stamp && cache[load_cache].recorded[load_key] > token ->
                printf("loader: the load is void\n")
            :: else ->
                printf("loader: stores %e in cache %d\n", NAMES(1 << load_key), load_cache);
                cache[load_cache].mapping[load_key] = load;
                cache[load_cache].is_dead[load_key] = 0
            fi;
            load = NONE; load_cache = 0; load_key = 0; token = 0 }
    od
}

/* --- a thread that reads ----------------------------------------------------------------------------------------- */

#ifdef REACH
#define SERVES(value) assert(!(has_happened_at_lease))
#else
#define SERVES(value) assert(value != BROKEN)
#endif

#define READS(i, k) :: d_step { true -> hit_cache = i; hit_key = k; hit_stamp = cache[i].stamp }
#ifdef WITHOUT_STAMP_CHECK
#define IS_UNCHANGED 1
#else
#define IS_UNCHANGED (cache[hit_cache].stamp == hit_stamp)
#endif

#define LOOKS(i, k) \
    :: d_step { is_leased && !cache[i].is_locked && cache[i].mapping[k] != NONE && !cache[i].is_dead[k] -> \
        printf("reader: a hit on %e in cache %d, with the lock\n", NAMES(1 << k), i); \
        SERVES(cache[i].mapping[k]) }

active proctype reader() {
end:
    do
#ifdef THREADS
    :: if
        READS(0, 0)
        fi;
        if
        :: is_leased && !cache[hit_cache].is_slow ->
            hit = cache[hit_cache].mapping[hit_key];
            if
            :: d_step { IS_UNCHANGED ->
                if :: hit != NONE -> printf("reader: a hit on %e in cache %d\n", NAMES(1 << hit_key), hit_cache);
                    HAPPENS(A_FAST_HIT);
                    SERVES(hit) :: else fi }
            :: else
            fi
        :: else
        fi;
        d_step { hit = NONE; hit_cache = 0; hit_key = 0; hit_stamp = 0 }
#endif
    /* With the lock, and with a look at what is dead. */
    LOOKS(0, 0)
    LOOKS(0, 1)
    LOOKS(1, 0)
    LOOKS(1, 1)
    od
}
