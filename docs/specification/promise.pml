/* The protocol between one publisher side (log, channel, servers) and one replica. README.md says what is modelled.
 *
 * One process: each option of its loop is one event that can happen at any moment. Everything inside an option is one
 * atomic step. Faults have budgets (how often they may happen); a budget of 0 removes the fault from the model.
 */

/* --- the scope: how much of everything -------------------------------------------------------------------------- */

#ifndef SEQUENCES
#define SEQUENCES 4 /* the highest sequence of an epoch */
#endif
#ifndef ACCEPTS
#define ACCEPTS 4 /* accepted invalidations, a split one counts as two */
#endif
#ifndef WIRE
#define WIRE 3 /* messages under way to the replica */
#endif
#ifndef CUTS
#define CUTS 0 /* a connection is lost; the replica notices later */
#endif
#ifndef FORGED
#define FORGED 0 /* frames published by a user with rights to the channel only */
#endif
#ifndef POSTS
#define POSTS 0 /* POSTs to the replica with a guessed id */
#endif
#ifndef TRIMS
#define TRIMS 0 /* the log loses its oldest entries */
#endif
#ifndef FLUSHES
#define FLUSHES 0 /* head and log are lost, the server goes on */
#endif
#ifndef RESTARTS
#define RESTARTS 0 /* the server restarts or a replica of it is promoted; the tail of the log may be lost */
#endif
#ifndef HANDS
#define HANDS 0 /* HINCRBY head seq -1 by a foreign hand */
#endif
#ifndef BLIPS
#define BLIPS 0 /* the primary is demoted and promoted again between two echoes, the connection stays */
#endif
#ifndef QUEUED
#define QUEUED 0 /* scripts waiting in a frozen primary; a failover; the scripts run when it thaws */
#endif
#ifndef OWNS
#define OWNS 0 /* invalidations by the replica itself */
#endif
#ifndef SAME_IDS
#define SAME_IDS 0 /* another publisher uses an id a second time */
#endif

/* --- values ------------------------------------------------------------------------------------------------------ */

/* How old a value is. The order of acceptance is time: a value is stale from the moment that an invalidation of its
 * key is accepted. What matters is only whether that was before the moment t0 at which an echo was sent. */
#define NONE 0   /* no value */
#define FRESH 1  /* no invalidation of its key has been accepted since it was read from the source */
#define STALE 2  /* one has, after the echo under way was sent (or no echo is under way) */
#define DUE 3    /* one has, before the echo under way was sent */
#define BROKEN 4 /* one has, before the lease's coherent_as_of */

/* The content of a frame: who made it (bits 2..5) and which keys it names (bit 0: a, bit 1: b). The digest of a frame is
 * (epoch, sequence, content). A server's history changes its term, so that equal contents are equal bytes. */
#define BY_TERM(keys) ((term << 2) | (keys))
#define BY_OLD_PRIMARY(keys) ((8 << 2) | (keys))
#define BY_OWN(keys) ((9 << 2) | (keys))
#define BY_OWN_ID(keys) ((10 << 2) | (keys)) /* another publisher, with the id of the replica's own invalidation */
#define BY_FORGER(keys) ((11 << 2) | (keys))
#define KEYS(content) ((content) & 3)
#define IS_OF_OWN_ID(content) (((content) >> 2) == 9 || ((content) >> 2) == 10)

/* For trails: what a content names. */
mtype = { a_and_b, b, a, nothing_here };
#define NAMES(content) (KEYS(content) + 1)

#define PROBE 7 /* in the place of an epoch: the probe of an echo */
#define FOREIGN_EPOCH 6

/* --- the servers ------------------------------------------------------------------------------------------------- */

#ifdef WITHOUT_CREATED_HEAD
byte epoch, epochs; /* nothing was ever published */
#else
byte epoch = 1; /* 0: there is no head */
byte epochs = 1;
#endif
byte seq;
byte digest, digest_seq;
byte log[SEQUENCES + 1]; /* by sequence */
byte oldest = 1;         /* the oldest sequence that the log still has */
byte term;
byte identity; /* run id and replication id of the primary: changes with a restart and with a promotion */

#if QUEUED
bit has_failed_over;
byte queued = QUEUED;
byte old_seq, old_digest;
byte old_log[SEQUENCES + 1];
byte old_oldest;
#endif

/* --- the link ---------------------------------------------------------------------------------------------------- */

chan wire = [WIRE] of { byte, byte, byte }; /* epoch, sequence, content */

#define DOWN 0
#define CONNECTED 1  /* the server's identity has been read */
#define SUBSCRIBED 2 /* the channel is delivered */
#define RECOVERED 3  /* the head has been read; from here on echoes are sent, replays permitting */
byte phase;
bit is_alive;  /* 0: the connection is lost, and the replica has not noticed */
bit is_at_old; /* the link leads to the demoted primary */
byte link_identity;

/* --- the replica ------------------------------------------------------------------------------------------------- */

bit is_leased; /* reads are served */
byte entry[2], load[2];

byte live_epoch, live_seq, live_content;
byte proven_epoch, proven_seq, proven_content, proven_identity;
byte run_first, run_last, run_content;

bit is_replaying;
byte target; /* the head that a replay has to reach */
bit is_for_echo;

#define QUIET 0
#define SENT 1
#define CARRIED_OUT 2
#define CAPTURED 3
byte echo;
bit is_early; /* the echo was sent before the failover */
byte head_epoch, head_seq, head_content; /* the answer of the echo */
bit is_digest_known, is_head_moved_back;
byte answer_identity;
byte captured_epoch, captured_seq, captured_content;

#if BLIPS
bit is_quiet; /* QUIET_AFTER_BLIP: nothing is published until the next echo */
#endif
#if OWNS
bit is_own_under_way, is_own_accepted, is_own_awaited;
#endif
#ifdef OLD_C3
byte posted;
#endif

/* --- budgets ----------------------------------------------------------------------------------------------------- */

byte accepts = ACCEPTS;
#if CUTS
byte cuts = CUTS;
#endif
#if FORGED
byte forged = FORGED;
#endif
#if POSTS
byte posts = POSTS;
#endif
#if TRIMS
byte trims = TRIMS;
#endif
#if FLUSHES
byte flushes = FLUSHES;
#endif
#if RESTARTS
byte restarts = RESTARTS;
#endif
#if HANDS
byte hands = HANDS;
#endif
#if BLIPS
byte blips = BLIPS;
#endif
#if OWNS
byte owns = OWNS;
#endif
#if SAME_IDS
byte same_ids = SAME_IDS;
#endif

/* Whether a hit can be served under a lease that is younger than a fault. */
#ifdef REACH
bit has_happened, has_happened_at_t0, has_happened_at_lease;
#define HAPPENS(fault) if :: fault == REACH -> has_happened = 1 :: else fi
#else
#define HAPPENS(fault) skip
#endif
#define A_CUT 1
#define A_FORGED_FRAME 2
#define A_POST 3
#define A_TRIM 4
#define A_FLUSH 5
#define A_RESTART 6
#define A_HAND 7
#define A_BLIP 8
#define A_FAILOVER 9
#define A_THAW 10
#define AN_OWN 11
#define A_SAME_ID 12
#define A_REPLAY 13
#define A_SPLIT 14
#define A_CLEAR 15

byte e, s, c, i; /* scratch of one step, 0 between two steps */
byte is_skipped, is_whole;

/* --- what happens to values -------------------------------------------------------------------------------------- */

#define OUTDATE(value) if :: value == FRESH -> value = STALE :: else fi
inline outdate(keys) {
    if :: (keys) & 1 -> OUTDATE(entry[0]); OUTDATE(load[0]) :: else fi;
    if :: (keys) & 2 -> OUTDATE(entry[1]); OUTDATE(load[1]) :: else fi
}

#ifdef WITHOUT_VOIDED_LOADS
#define VOID(k) skip
#else
#define VOID(k) load[k] = NONE
#endif
inline apply(keys) {
    if :: (keys) & 1 -> entry[0] = NONE; VOID(0) :: else fi;
    if :: (keys) & 2 -> entry[1] = NONE; VOID(1) :: else fi
}

#define EACH_VALUE(from, to) \
    if :: entry[0] == from -> entry[0] = to :: else fi; if :: entry[1] == from -> entry[1] = to :: else fi; \
    if :: load[0] == from -> load[0] = to :: else fi; if :: load[1] == from -> load[1] = to :: else fi

inline clear() {
    printf("replica: clears everything\n");
    HAPPENS(A_CLEAR);
    apply(3)
}

/* --- log and channel --------------------------------------------------------------------------------------------- */

inline create_head() {
    epochs++;
    epoch = epochs;
    seq = 0; digest = 0; digest_seq = 0; oldest = 1;
    for (i : 0 .. SEQUENCES) { log[i] = 0 }
}

#define IS_DELIVERED (phase >= SUBSCRIBED && is_alive)

/* One frame of the append script. A link to the old primary is reached over the cluster bus, or not. */
inline append(content, is_over_bus) {
    if :: epoch == 0 -> create_head() :: else fi;
    if
    :: log[seq + 1] != 0 -> /* a foreign hand moved the head back: the stream refuses the id */
#ifdef WITHOUT_NEW_EPOCH
        for (i : 0 .. SEQUENCES) { log[i] = 0 }
        oldest = seq + 1
#else
        create_head()
#endif
    :: else
    fi;
    seq++;
    log[seq] = content;
    digest = content; digest_seq = seq;
    printf("log: (epoch %d, sequence %d) names %e\n", epoch, seq, NAMES(content));
    if :: IS_DELIVERED && (!is_at_old || is_over_bus) -> wire!epoch, seq, content :: else fi
}

#define HAS_ROOM(frames) (!IS_DELIVERED || len(wire) + (frames) <= WIRE)
#if BLIPS && defined(QUIET_AFTER_BLIP)
#define MAY_PUBLISH !is_quiet
#else
#define MAY_PUBLISH 1
#endif
#define CAN_APPEND(frames) (MAY_PUBLISH && accepts >= (frames) && (epoch == 0 || seq + (frames) <= SEQUENCES) && HAS_ROOM(frames))

/* --- the link ---------------------------------------------------------------------------------------------------- */

inline abandon_echo() {
    echo = QUIET; is_early = 0; is_for_echo = 0;
    head_epoch = 0; head_seq = 0; head_content = 0; is_digest_known = 0; is_head_moved_back = 0; answer_identity = 0;
    captured_epoch = 0; captured_seq = 0; captured_content = 0;
    EACH_VALUE(DUE, STALE)
#ifdef REACH
    has_happened_at_t0 = 0;
#endif
}

inline drain() {
    do :: nempty(wire) -> wire?_, _, _ :: empty(wire) -> break od
}

inline lose_link() {
    printf("replica: the link is lost; reads are bypassed\n");
    phase = DOWN; is_alive = 0; is_at_old = 0; is_leased = 0; link_identity = 0;
    is_replaying = 0; target = 0;
    run_first = 0; run_last = 0; run_content = 0;
    drain();
    abandon_echo()
}

/* --- position ---------------------------------------------------------------------------------------------------- */

inline join_run() {
    if
    :: run_first != 0 && run_first <= live_seq + 1 ->
        if :: run_last > live_seq -> live_seq = run_last; live_content = run_content :: else fi;
        run_first = 0; run_last = 0; run_content = 0
    :: else
    fi
}

inline adopt(an_epoch, a_seq, a_content) {
    live_epoch = an_epoch; live_seq = a_seq; live_content = a_content;
    proven_epoch = an_epoch; proven_seq = a_seq; proven_content = a_content; proven_identity = link_identity;
    run_first = 0; run_last = 0; run_content = 0;
    is_replaying = 0; target = 0
}

inline grant() {
    printf("replica: coherent as of the moment the echo was sent\n");
#ifdef WITHOUT_T0
    EACH_VALUE(STALE, DUE);
#endif
    EACH_VALUE(DUE, BROKEN);
    is_leased = 1;
#ifdef REACH
    has_happened_at_lease = has_happened_at_t0;
#endif
    abandon_echo()
}

#if defined(WITHOUT_CURSOR)
#define CHANNEL_MOVES_POSITION 1
#else
#define CHANNEL_MOVES_POSITION (!is_replaying && phase == RECOVERED)
#endif

/* A frame off the channel, in the reader. */
inline receive(an_epoch, a_seq, a_content) {
    is_skipped = 0;
#ifdef OLD_SKIP
    if :: an_epoch == live_epoch && a_seq <= live_seq -> is_skipped = 1 :: else fi;
#endif
    skip_own_or_posted(a_content);
    if
    :: is_skipped -> printf("replica: skips (epoch %d, sequence %d) names %e\n", an_epoch, a_seq, NAMES(a_content))
    :: else -> printf("replica: applies (epoch %d, sequence %d) names %e\n", an_epoch, a_seq, NAMES(a_content));
        apply(KEYS(a_content))
    fi;
    if
    :: an_epoch == live_epoch && a_seq == live_seq + 1 && CHANNEL_MOVES_POSITION ->
        live_seq = a_seq; live_content = a_content;
        join_run()
    :: an_epoch == live_epoch && a_seq > live_seq && !(a_seq == live_seq + 1 && CHANNEL_MOVES_POSITION) ->
        if
        :: run_first == 0 || a_seq > run_last + 1 -> run_first = a_seq; run_last = a_seq; run_content = a_content
        :: run_first != 0 && a_seq == run_last + 1 -> run_last = a_seq; run_content = a_content
        :: else
        fi
    :: else
    fi
}

inline skip_own_or_posted(a_content) {
#if OWNS
    if
#ifdef WITHOUT_OWN_TARGETS
    :: is_own_awaited && IS_OF_OWN_ID(a_content) -> is_skipped = 1
#else
    :: is_own_awaited && IS_OF_OWN_ID(a_content) && KEYS(a_content) == 1 -> is_skipped = 1
#endif
#ifndef WITHOUT_OWN_ONCE
        ; is_own_awaited = 0
#endif
    :: else
    fi;
#endif
#ifdef OLD_C3
    if :: posted != 0 && posted == KEYS(a_content) -> is_skipped = 1; posted = 0 :: else fi;
#endif
    skip
}

/* --- what a server answers --------------------------------------------------------------------------------------- */

inline read_head() {
#if QUEUED
    if
    :: is_at_old ->
        head_epoch = epoch; head_seq = old_seq; head_content = old_digest; is_digest_known = 1;
        answer_identity = 0
    :: else ->
#endif
    head_epoch = epoch; head_seq = seq; head_content = digest; is_digest_known = (digest_seq == seq);
    is_head_moved_back = (digest_seq > seq);
    answer_identity = identity
#if QUEUED
    fi
#endif
}

inline forget_head() {
    head_epoch = 0; head_seq = 0; head_content = 0; is_digest_known = 0; is_head_moved_back = 0; answer_identity = 0
}

#if QUEUED
#define ENTRY(n) (is_at_old -> old_log[n] : log[n])
#define OLDEST (is_at_old -> old_oldest : oldest)
#define NEWEST (is_at_old -> old_seq : seq)
#else
#define ENTRY(n) log[n]
#define OLDEST oldest
#define NEWEST seq
#endif
/* The log has the entry of the replica's own position, with the same digest. */
#ifdef WITHOUT_DIGEST_IN_LOG
#define STANDS(n, content) ((n) == 0 || ((n) >= OLDEST && (n) <= NEWEST))
#else
#define STANDS(n, content) ((n) == 0 || ((n) >= OLDEST && (n) <= NEWEST && ENTRY(n) == content))
#endif

#ifdef UNKNOWN_IDENTITY
#ifdef WITHOUT_DOUBT
#define IS_SAME_SERVER 1
#else
#define IS_SAME_SERVER 0
#endif
#define IS_IDENTITY_KEPT 1
#else
#ifdef WITHOUT_IDENTITY
#define IS_SAME_SERVER 1
#else
#define IS_SAME_SERVER (proven_identity == link_identity)
#endif
#ifdef WITHOUT_IDENTITY_IN_ECHO
#define IS_IDENTITY_KEPT 1
#else
#define IS_IDENTITY_KEPT (answer_identity == link_identity)
#endif
#endif

#ifdef WITHOUT_DIGEST_AT_HEAD
#define IS_OTHER_FRAME(content) 0
#else
#define IS_OTHER_FRAME(content) (is_digest_known && head_content != content)
#endif

/* The head was read after the subscription: may the replica go on from its proven position? */
inline resume() {
    read_head();
    is_whole = 1;
    if :: head_epoch == 0 || proven_epoch == 0 || !IS_SAME_SERVER -> is_whole = 0 :: else fi;
#ifdef WITHOUT_CREATED_HEAD
    if :: head_epoch == 0 && proven_epoch == 0 && IS_SAME_SERVER && has_subscribed -> is_whole = 1 :: else fi;
#endif
#ifndef WITHOUT_EPOCH
    if :: head_epoch != live_epoch -> is_whole = 0 :: else fi;
#endif
    if :: head_seq < live_seq -> is_whole = 0 :: else fi;
#ifndef WITHOUT_HEAD_DOUBT
    if :: is_head_moved_back -> is_whole = 0 :: else fi;
#endif
#if !defined(WITHOUT_DIGEST_ON_RESUME) && !defined(OLD_C2)
    if :: head_seq == live_seq && live_seq != 0 && IS_OTHER_FRAME(live_content) -> is_whole = 0 :: else fi;
    if :: live_seq != 0 && !STANDS(live_seq, live_content) -> is_whole = 0 :: else fi;
#endif
    if
    :: is_whole ->
        printf("replica: goes on from (epoch %d, sequence %d), the head is at %d\n", live_epoch, live_seq, head_seq);
        if :: head_seq > live_seq -> is_replaying = 1; target = head_seq
        :: else -> live_epoch = head_epoch; join_run()
        fi
    :: else ->
        clear();
        adopt(head_epoch, head_seq, head_content)
    fi;
#ifdef WITHOUT_CREATED_HEAD
    has_subscribed = 1;
#endif
    forget_head()
}

inline end_replay() {
    is_replaying = 0; target = 0;
    join_run();
    if
    :: is_for_echo ->
        proven_epoch = head_epoch; proven_seq = head_seq; proven_content = head_content; proven_identity = link_identity;
        grant()
    :: else
    fi
}

#define HAS_NEXT \
    (live_epoch == epoch && live_seq + 1 >= OLDEST && live_seq + 1 <= NEWEST && ENTRY(live_seq + 1) != 0)
#if defined(WITHOUT_TRIM) || defined(OLD_C2)
#define CAN_READ_NEXT HAS_NEXT
#else
#define CAN_READ_NEXT (STANDS(live_seq, live_content) && HAS_NEXT)
#endif

/* One page: it begins at the own position, and brings the entry that follows. */
inline replay_page() {
    if
#ifdef WITHOUT_TRIM
    :: live_epoch == epoch && target > live_seq && live_seq + 1 < OLDEST ->
        printf("replica: reads on behind the hole in the log\n");
        live_seq = OLDEST - 1; live_content = 0;
        if :: live_seq >= target -> end_replay() :: else fi
#endif
    :: CAN_READ_NEXT ->
        c = ENTRY(live_seq + 1);
        is_skipped = 0;
        skip_own_or_posted(c);
        if :: is_skipped :: else -> apply(KEYS(c)) fi;
        live_seq++;
        live_content = c;
        HAPPENS(A_REPLAY);
        printf("replica: replays (epoch %d, sequence %d), names %e\n", live_epoch, live_seq, NAMES(c));
#ifdef WITHOUT_CURSOR
        join_run();
#endif
        if :: live_seq >= target -> end_replay() :: else fi
    :: else -> /* trimmed, or another history */
        if
        :: is_for_echo ->
            clear();
            adopt(head_epoch, head_seq, head_content);
            grant()
        :: else ->
            read_head();
            clear();
            adopt(head_epoch, head_seq, head_content);
            forget_head()
        fi
    fi
}

#ifdef WITHOUT_EPOCH
#define IS_OTHER_EPOCH 0
#else
#define IS_OTHER_EPOCH (captured_epoch != head_epoch)
#endif
#if defined(WITHOUT_CAPTURE) || defined(WITHOUT_AHEAD)
#define IS_AHEAD 0
#else
#define IS_AHEAD (captured_epoch == head_epoch && captured_seq > head_seq)
#endif
#ifdef WITHOUT_HEAD_DOUBT
#define IS_DOUBTFUL 0
#else
#define IS_DOUBTFUL is_head_moved_back
#endif
#define IS_OTHER_HISTORY (IS_OTHER_EPOCH || IS_AHEAD || IS_DOUBTFUL || \
    (captured_epoch == head_epoch && captured_seq == head_seq && head_seq != 0 && IS_OTHER_FRAME(captured_content)))

/* Probe and answer are there. */
inline judge_echo() {
#ifdef WITHOUT_CAPTURE
    /* Messages that came after the probe have moved the position: being ahead of the head proves nothing. */
    captured_epoch = live_epoch; captured_seq = live_seq; captured_content = live_content;
#endif
    if
    :: !IS_IDENTITY_KEPT -> printf("replica: the server was demoted or promoted\n"); lose_link()
    :: IS_IDENTITY_KEPT && IS_OTHER_HISTORY ->
        printf("replica: another history at the head\n");
        clear();
        adopt(head_epoch, head_seq, head_content);
        grant()
    :: else ->
        if
#ifndef WITHOUT_BEHIND
        :: captured_epoch == head_epoch && captured_seq < head_seq ->
            printf("replica: behind the head, reads the log\n");
            live_epoch = captured_epoch; live_seq = captured_seq; live_content = captured_content;
            is_replaying = 1; is_for_echo = 1; target = head_seq
#endif
        :: else ->
            proven_epoch = head_epoch; proven_seq = head_seq; proven_content = head_content;
            proven_identity = link_identity;
#ifdef WITHOUT_EPOCH
            live_epoch = head_epoch;
#endif
            grant()
        fi
    fi
}

#ifdef WITHOUT_CREATED_HEAD
bit has_subscribed;
#endif

/* A thawed primary that does not know yet that it was demoted carries out an echo that was sent before the failover. */
#ifdef TWO_PRIMARIES
#define MAY_ECHO_AT_OLD 1
#else
#define MAY_ECHO_AT_OLD is_early
#endif

/* The id of an own invalidation is random: another publisher can use it as soon as it can be seen. */
#ifdef FORESEEN_OWN_ID
#define IS_OWN_ID_SEEN 1
#else
#define IS_OWN_ID_SEEN is_own_accepted
#endif

#define END e = 0; s = 0; c = 0; i = 0; is_skipped = 0; is_whole = 0

/* --- events with a choice: one option for each -------------------------------------------------------------------- */

#define PUBLISHES(keys, is_over_bus) \
    :: d_step { CAN_APPEND(1) && (!is_over_bus || is_at_old) -> \
        printf("publisher: an invalidation of %e is accepted\n", NAMES(keys)); \
        accepts--; \
        outdate(keys); \
        append(BY_TERM(keys), is_over_bus); END }

/* A forged frame that names no key of ours is the strongest: what is dropped cannot be stale. The exception is a
 * frame that is byte for byte one that the log has or will have. */
#define FORGES_AT(a_seq, condition) \
    FORGES(a_seq, BY_FORGER(0), condition) FORGES(a_seq, BY_TERM(1), condition) FORGES(a_seq, BY_TERM(2), condition)
#define FORGES(a_seq, content, condition) \
    :: d_step { forged > 0 && IS_DELIVERED && nfull(wire) && epoch != 0 && (condition) && (a_seq) <= SEQUENCES -> \
        printf("forger: publishes (epoch %d, sequence %d) names %e\n", epoch, a_seq, NAMES(content)); \
        HAPPENS(A_FORGED_FRAME); \
        forged--; \
        wire!epoch, a_seq, content; END }

#ifdef OLD_C3
#define REMEMBER_POST(keys) posted = keys
#else
#define REMEMBER_POST(keys) skip
#endif
#define POSTS_ONE(keys) \
    :: d_step { posts > 0 && phase != DOWN -> \
        printf("forger: POSTs an invalidation of %e with the id of one to come\n", NAMES(keys)); \
        HAPPENS(A_POST); \
        posts--; \
        REMEMBER_POST(keys); \
        apply(keys); END }

#define TRIMS_TO(a_seq, condition) \
    :: d_step { trims > 0 && oldest <= seq && epoch != 0 && (condition) -> \
        trims--; oldest = a_seq; \
        printf("fault: the log is trimmed, its oldest entry is now %d\n", oldest); \
        HAPPENS(A_TRIM); END }

#define LOSE_TAIL(count) \
    i = count; \
    do :: i > 0 -> log[seq] = 0; seq--; i-- :: else -> break od; \
    digest = log[seq]; digest_seq = seq
#define RESTARTS_WITHOUT(count) \
    :: d_step { restarts > 0 && epoch != 0 && seq + 1 >= oldest + count -> \
        restarts--; identity++; term++; \
        LOSE_TAIL(count); \
        printf("fault: the server restarts, the log ends at %d\n", seq); \
        HAPPENS(A_RESTART); \
        is_alive = 0; \
        drain(); END }

/* Another server was the primary in between: what it accepted was not delivered here. The last entries from before may
 * be lost, though they were delivered. `kept` and `more` are in the log afterwards; with LOST_TWICE, something is not. */
#define BLIPS_WITH(count, kept, more) \
    :: d_step { blips > 0 && epoch != 0 && phase == RECOVERED && is_alive && accepts >= 2 && seq + 2 <= SEQUENCES && \
            seq + 1 >= oldest + count -> \
        blips--; identity++; term++; accepts = accepts - 2; \
        LOSE_TAIL(count); \
        printf("fault: the primary is demoted and promoted again; elsewhere invalidations were accepted\n"); \
        outdate(kept | more); \
        if :: kept != 0 -> seq++; log[seq] = BY_TERM(kept) :: else fi; \
        if :: kept != 0 && more != 0 -> seq++; log[seq] = BY_TERM(more) :: else fi; \
        digest = log[seq]; digest_seq = seq; \
        is_quiet = 1; \
        HAPPENS(A_BLIP); END }

#define FAILS_OVER(count) \
    :: d_step { !has_failed_over && epoch != 0 && seq + 1 >= oldest + count -> \
        printf("fault: the primary freezes with %d scripts waiting; another server is promoted\n", queued); \
        HAPPENS(A_FAILOVER); \
        has_failed_over = 1; \
        old_seq = seq; old_digest = digest; old_oldest = oldest; \
        for (i : 0 .. SEQUENCES) { old_log[i] = log[i] } \
        identity = 1; term = 1; \
        LOSE_TAIL(count); \
        if :: phase != DOWN && is_alive -> is_at_old = 1 :: else fi; END }
#define THAWED_RUNS(keys) \
    :: d_step { has_failed_over && queued > 0 && old_seq < SEQUENCES && (!IS_DELIVERED || nfull(wire)) -> \
        queued--; old_seq++; \
        old_log[old_seq] = BY_OLD_PRIMARY(keys); old_digest = old_log[old_seq]; \
        printf("old primary: thaws and carries out a waiting script: (epoch %d, sequence %d) names %e\n", epoch, \
            old_seq, NAMES(keys)); \
        HAPPENS(A_THAW); \
        if :: IS_DELIVERED -> wire!epoch, old_seq, old_log[old_seq] :: else fi; END }

#define USES_OWN_ID(keys) \
    :: d_step { is_own_under_way && IS_OWN_ID_SEEN && CAN_APPEND(1) -> \
        printf("publisher: another one publishes an invalidation of %e with that id\n", NAMES(keys)); \
        accepts--; \
        outdate(keys); \
        append(BY_OWN_ID(keys), 0); END }

active proctype world() {
    do
    /* --- publishers --------------------------------------------------------------------------------------------- */
    PUBLISHES(1, 0)
    PUBLISHES(2, 0)
#if QUEUED
    PUBLISHES(1, 1)
    PUBLISHES(2, 1)
#endif
    :: d_step { CAN_APPEND(2) && !is_at_old ->
        printf("publisher: an invalidation in two parts is accepted\n");
        HAPPENS(A_SPLIT);
        accepts = accepts - 2;
        outdate(3);
        append(BY_TERM(1), 0);
        append(BY_TERM(2), 0); END }
#if SAME_IDS
    /* With the id of an earlier invalidation of key a, by another publisher: a receipt must not be found for it. */
    :: d_step { same_ids > 0 && CAN_APPEND(1) ->
        printf("publisher: another one publishes with an id that was used before, and is told that it is accepted\n");
        same_ids--; accepts--;
        HAPPENS(A_SAME_ID);
        outdate(1);
#ifndef WITHOUT_SCOPED_IDS
        append(BY_TERM(1), 0);
#endif
        END }
#endif

    /* --- the service: loads and reads --------------------------------------------------------------------------- */
    :: d_step { entry[0] == NONE && load[0] == NONE -> printf("service: reads a from the source\n"); load[0] = FRESH; END }
    :: d_step { entry[1] == NONE && load[1] == NONE -> printf("service: reads b from the source\n"); load[1] = FRESH; END }
    :: d_step { load[0] != NONE -> printf("cache: stores a\n"); entry[0] = load[0]; load[0] = NONE; END }
    :: d_step { load[1] != NONE -> printf("cache: stores b\n"); entry[1] = load[1]; load[1] = NONE; END }
    :: d_step { is_leased && (entry[0] != NONE || entry[1] != NONE) ->
        printf("cache: serves reads\n");
#ifdef REACH
        assert(!has_happened_at_lease)
#else
        assert(entry[0] != BROKEN && entry[1] != BROKEN)
#endif
        ; END }

    /* --- the link ----------------------------------------------------------------------------------------------- */
    :: d_step { phase == DOWN ->
        printf("replica: connects\n");
        is_alive = 1; phase = CONNECTED; link_identity = identity; END }
#if QUEUED
    :: d_step { phase == DOWN && has_failed_over ->
        printf("replica: connects to the old primary\n");
        is_alive = 1; phase = CONNECTED; link_identity = 0; is_at_old = 1; END }
#endif
    :: d_step { phase == CONNECTED && is_alive ->
        printf("replica: subscribes\n");
#ifndef OLD_C2
#ifndef WITHOUT_PROVEN
        live_epoch = proven_epoch; live_seq = proven_seq; live_content = proven_content;
#endif
#endif
#if OWNS && !defined(WITHOUT_OWN_RESET)
        is_own_awaited = 0;
#endif
        phase = SUBSCRIBED; END }
    :: d_step { phase == SUBSCRIBED && is_alive -> phase = RECOVERED; resume(); END }
    :: d_step { phase == RECOVERED && is_alive && is_replaying -> replay_page(); END }
    :: d_step { phase == RECOVERED && !is_replaying && echo == QUIET && run_first != 0 && is_alive ->
        /* A gap: read the log up to its head. A claim that the log does not have is dropped. */
        if
        :: live_epoch == epoch && NEWEST > live_seq -> printf("replica: a gap, reads the log\n");
            is_replaying = 1; target = NEWEST
        :: else -> run_first = 0; run_last = 0; run_content = 0
        fi; END }
    :: d_step { nempty(wire) && is_alive ->
        wire?e, s, c;
        if
        :: e == PROBE -> printf("replica: the probe is back\n");
            captured_epoch = live_epoch; captured_seq = live_seq; captured_content = live_content;
            echo = CAPTURED
        :: else -> receive(e, s, c)
        fi; END }

    /* --- the echo ----------------------------------------------------------------------------------------------- */
    :: d_step { phase == RECOVERED && !is_replaying && echo == QUIET && is_alive ->
        printf("replica: sends an echo (t0)\n");
        echo = SENT;
        EACH_VALUE(STALE, DUE);
#if QUEUED
        is_early = !has_failed_over;
#endif
#ifdef REACH
        has_happened_at_t0 = has_happened;
#endif
        ; END }
    :: d_step { echo == SENT && is_alive && nfull(wire) && !is_at_old ->
        printf("server: carries out the echo, head (epoch %d, sequence %d)\n", epoch, seq);
#ifndef WITHOUT_CREATED_HEAD
        if :: epoch == 0 -> create_head() :: else fi;
#endif
        read_head();
        wire!PROBE, 0, 0;
#if BLIPS
        is_quiet = 0;
#endif
        echo = CARRIED_OUT; END }
#if QUEUED
    :: d_step { echo == SENT && is_alive && nfull(wire) && is_at_old && MAY_ECHO_AT_OLD ->
        printf("old primary: carries out the echo, head (epoch %d, sequence %d)\n", epoch, old_seq);
        read_head();
        wire!PROBE, 0, 0;
        echo = CARRIED_OUT; END }
    :: d_step { echo == SENT && is_alive && is_at_old -> printf("old primary: refuses the echo\n"); lose_link(); END }
#endif
    :: d_step { echo == CAPTURED && !is_replaying -> judge_echo(); END }

    /* --- faults ------------------------------------------------------------------------------------------------- */
#if CUTS
    :: d_step { cuts > 0 && phase != DOWN && is_alive ->
        printf("fault: the connection is lost\n");
        HAPPENS(A_CUT);
        cuts--; is_alive = 0;
        drain(); END }
#endif
    :: d_step { phase != DOWN && !is_alive -> lose_link(); END }
#if FORGED
    FORGES_AT(1, seq > 0)
    FORGES_AT(seq, seq > 1)
    FORGES_AT(seq + 1, 1)
    FORGES_AT(seq + 2, 1)
#endif
#if POSTS
    POSTS_ONE(1)
    POSTS_ONE(2)
#endif
#if TRIMS
    TRIMS_TO(oldest + 1, 1)
    TRIMS_TO(seq, seq > oldest + 1)
    TRIMS_TO(seq + 1, seq > oldest)
#endif
#if FLUSHES
    :: d_step { flushes > 0 && epoch != 0 ->
        printf("fault: head and log are lost\n");
        HAPPENS(A_FLUSH);
        flushes--;
        epoch = 0; seq = 0; digest = 0; digest_seq = 0; oldest = 1;
        for (i : 0 .. SEQUENCES) { log[i] = 0 }
        END }
#endif
#if RESTARTS
    RESTARTS_WITHOUT(0)
    RESTARTS_WITHOUT(1)
    RESTARTS_WITHOUT(2)
#endif
#if HANDS
    :: d_step { hands > 0 && epoch != 0 && seq > 0 ->
        hands--; term++; seq--;
        printf("foreign hand: moves the head back to %d\n", seq);
        HAPPENS(A_HAND); END }
#endif
#if BLIPS
    BLIPS_WITH(0, 1, 0)
    BLIPS_WITH(0, 2, 0)
    BLIPS_WITH(0, 1, 2)
    BLIPS_WITH(1, 1, 0)
    BLIPS_WITH(1, 2, 0)
    BLIPS_WITH(1, 1, 2)
    BLIPS_WITH(2, 1, 0)
    BLIPS_WITH(2, 2, 0)
#ifdef LOST_TWICE
    BLIPS_WITH(0, 0, 1)
    BLIPS_WITH(1, 0, 1)
#endif
#endif
#if QUEUED
    FAILS_OVER(0)
    FAILS_OVER(1)
    THAWED_RUNS(0)
    THAWED_RUNS(1)
#endif
#if OWNS
    :: d_step { owns > 0 && !is_own_under_way ->
        printf("replica: changes a in the source, applies its own invalidation, begins to publish it\n");
        HAPPENS(AN_OWN);
        owns--;
        is_own_under_way = 1; is_own_accepted = 0; is_own_awaited = 1;
        apply(1); END }
    :: d_step { is_own_under_way && !is_own_accepted && CAN_APPEND(1) ->
        printf("log: the replica's own invalidation is accepted\n");
        accepts--; is_own_accepted = 1;
        append(BY_OWN(1), 0); END } /* every value here was read after the change */
    :: d_step { is_own_under_way && is_own_accepted ->
        printf("replica: the publish returns\n");
        is_own_under_way = 0; is_own_accepted = 0; is_own_awaited = 0; END }
    /* Another publisher may use the id as soon as it can be seen. */
    USES_OWN_ID(1)
    USES_OWN_ID(2)
#endif
    od
}
