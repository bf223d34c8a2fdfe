/* When a publisher may say that an invalidation of two parts has been applied by every replica. README.md says what is
 * modelled. One replica, one invalidation; a forger who knows its id and sequences; a registry that can be lost.
 */

bit is_accepted;
bit is_registry_young;    /* it was created less than the longest lease ago */
bit is_listed = 1;        /* the replica is in the registry */
bit is_expected;          /* it was when the invalidation was accepted */
bit is_leased = 1;        /* the replica serves reads */
bit is_stalled;           /* nothing arrives at the replica any more, and it has not noticed */
byte forged = 2;
byte arrived;             /* the parts that the channel has delivered */
bit is_applied[2];        /* the real frame of a part */
bit is_reported[2];       /* the replica reported a frame of this id and sequence */
bit is_digest_right[2];   /* … with the digest of the real one */
byte live, proven;        /* position, counted from the head before the invalidation */

#ifdef REACH
bit has_happened;
#define HAPPENS(fault) if :: fault == REACH -> has_happened = 1 :: else fi
#else
#define HAPPENS(fault) skip
#endif
#define A_FORGED_REPORT 1
#define A_LOST_REGISTRY 2
#define A_STALL 3

#ifdef WITHOUT_REPORT_DIGEST
#define SAYS(part) is_reported[part]
#else
#define SAYS(part) (is_reported[part] && is_digest_right[part])
#endif
#ifdef WITHOUT_EACH_PART
#define HAS_REPORTED (SAYS(0) || SAYS(1))
#else
#define HAS_REPORTED (SAYS(0) && SAYS(1))
#endif
#ifdef WITHOUT_PROVEN
#define HAS_REACHED (live >= 2)
#else
#define HAS_REACHED (proven >= 2)
#endif
#ifdef WITHOUT_REGISTRY_AGE
#define IS_REGISTRY_KNOWN 1
#else
#define IS_REGISTRY_KNOWN !is_registry_young
#endif
#ifdef WITHOUT_EXPECTED
#define IS_MISSING 0
#else
#define IS_MISSING (is_expected || is_listed)
#endif
#define IS_COMPLETE (is_accepted && IS_REGISTRY_KNOWN && (HAS_REPORTED || HAS_REACHED || !IS_MISSING))

#define FORGES(part) \
    :: d_step { forged > 0 && !is_stalled -> \
        forged--; \
        printf("forger: publishes a frame with the id and the sequence of part %d\n", part + 1); \
        HAPPENS(A_FORGED_REPORT); \
        if :: !is_reported[part] -> is_reported[part] = 1 :: else fi; \
        if :: live == part -> live++ :: else fi }

active proctype world() {
end:
    do
    :: d_step { !is_accepted ->
        printf("publisher: an invalidation in two parts is accepted\n");
        is_accepted = 1; is_expected = is_listed }
    :: d_step { is_accepted && arrived < 2 && !is_stalled ->
        printf("replica: applies part %d, and reports it\n", arrived + 1);
        is_applied[arrived] = 1; is_reported[arrived] = 1; is_digest_right[arrived] = 1;
        if :: live == arrived -> live++ :: else fi;
        arrived++ }
    FORGES(0)
    FORGES(1)
    :: d_step { !is_stalled && (!is_accepted || arrived == 2) ->
        printf("replica: an echo; it is listed, and tells what the echo has proven\n");
        is_listed = 1; is_leased = 1;
        proven = (is_accepted -> 2 : 0) }
    :: d_step { !is_stalled -> printf("fault: the replica hangs\n"); HAPPENS(A_STALL); is_stalled = 1 }
    :: d_step { is_leased && is_stalled -> printf("replica: its lease and its presence end\n");
        is_leased = 0; is_listed = 0; is_expected = 0 }
    :: d_step { !is_registry_young -> printf("fault: the registry is lost, and begins again\n");
        HAPPENS(A_LOST_REGISTRY);
        is_registry_young = 1; is_listed = 0 }
    :: d_step { is_registry_young && (is_listed || !is_leased) -> printf("registry: is older than the longest lease\n");
        is_registry_young = 0 }
    :: d_step { IS_COMPLETE ->
        printf("publisher: the confirmation is complete\n");
#ifdef REACH
        assert(!(has_happened && is_leased))
#else
        assert(!is_leased || (is_applied[0] && is_applied[1]))
#endif
        }
    od
}
