// The protocol of csrc/protocol.h: N ranks that call ops on one workspace for ever. README.md says what is
// modelled, what each step is in csrc, and how to run it.
//
// Everything is counted modulo EPOCHS, so the state space is finite and the search is over runs of any length. What a
// rank writes in round e is the value TAG(e); a reader of round e must find TAG(e).

#ifndef N
#define N 3  // ranks
#endif
#ifndef OPS
#define OPS (1 << STAGE)  // the ops of a run: at each call any of them, the same on all ranks
#endif
#ifndef CHUNKS
#define CHUNKS 1  // of staged and gathered rows
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0  // how many waits may end at their deadline
#endif
#ifndef DEATHS
#define DEATHS 0  // how many ranks may die
#endif
#ifndef MISTAKES
#define MISTAKES 0  // how many calls may be another op than the other ranks'
#endif

#define FAULTS (TIMEOUTS + DEATHS + MISTAKES > 0)
#define WHEN(condition, what) if :: condition -> what :: else fi

#define EPOCHS 4  // 2^32 in csrc
#define AHEAD 1   // kMostAhead, which is 16: more than any word ever is
#define TAG(e) ((e) + 1)
#define GARBAGE (EPOCHS + 1)
#define AFTER(e) (((e) + 1) % EPOCHS)
#define BEHIND(e, f) (((e) + EPOCHS - (f)) % EPOCHS)  // how many rounds f is before e
#define PEER(k) ((me + (k)) % N)

// The ops, which are the fingerprints too. AG_STAGE, AG_POST and AG_PLACE have two rounds; AG_POST_ONCE and
// AG_PLACE_ONCE have one, in which normalised rows are posted, too.
#define STAGE 1
#define POST 2
#define PLACE 3
#define GATHER 4
#define AG_STAGE 5
#define AG_POST 6
#define AG_PLACE 7
#define AG_POST_ONCE 8
#define AG_PLACE_ONCE 9
#define IN_OPS(k) ((OPS >> (k)) & 1)
#define posts(k) ((k) == POST || (k) == AG_POST || (k) == AG_POST_ONCE)
#define in_place(k) ((k) == PLACE || (k) == AG_PLACE || (k) == AG_PLACE_ONCE)
#define posts_normed(k) ((k) >= AG_POST_ONCE)
#define stages(k) ((k) == STAGE || (k) == AG_STAGE)
#define gathers_after(k) ((k) >= AG_STAGE && (k) <= AG_PLACE)

// The steps of a round, each with a word from every rank to every other.
#define OPEN(c) (c)
#ifdef CPU
#define closes(k) in_place(k)
#define GATHER_STEP(c) (c)  // the CPU's second round meets as its first does
#else
#define closes(k) ((k) == PLACE)  // the gathering says so, too
#define GATHER_STEP(c) (CHUNKS + (c))
#endif
#define CLOSE (2 * CHUNKS)
#define STEPS (2 * CHUNKS + 1)

#ifdef BUG_EQUAL
#define REACHED(seen, mine) ((seen) == (mine))
#else
#ifdef BUG_UNSIGNED
#define REACHED(seen, mine) ((seen) >= (mine))
#else
#define REACHED(seen, mine) (BEHIND(seen, mine) <= AHEAD)
#endif
#endif
#ifdef BUG_ONE_SLOT
#define SLOT(e) 0
#else
#define SLOT(e) ((e) & 1)
#endif
#ifdef BUG_ONE_INBOX
#define INBOX(e) 0
#else
#define INBOX(e) ((e) & 1)
#endif
#ifdef BUG_GATHER_IN_SAME_SLOT
#define GATHER_SLOT(e) SLOT((e) + 1)  // that of the round before
#else
#define GATHER_SLOT(e) SLOT(e)
#endif

// Symmetric memory. A slot has a cell for every source and chunk; published rows take all cells of a chunk.
byte word_epoch[STEPS * N * N], word_op[STEPS * N * N];
byte slot[N * 2 * N * CHUNKS];
byte inbox[N * 2 * 2 * N];  // of every source the rows to be added up; behind all these, the normalised ones
byte input[N];  // that peers read in place
byte epoch[N];  // rounds finished
bool notified[N], dead[N];  // a peer has given up and says so
#define AT(step, to, from) (((step) * N + (to)) * N + (from))
#define CELL(owner, half, chunk, source) ((((owner) * 2 + (half)) * CHUNKS + (chunk)) * N + (source))
#define BOX(owner, half, part, source) ((((owner) * 2 + (half)) * 2 + (part)) * N + (source))
#define ADDED 0
#ifdef BUG_ONE_PART
#define NORMED 0
#else
#define NORMED 1
#endif

// What no rank of csrc has: the op that all call in a round, how many have ended it, what each has called.
byte op_of[EPOCHS], ended[EPOCHS];
#if MISTAKES > 0
byte called[N * EPOCHS];
#endif
#ifdef LIVE
bool odd[N];  // calls finished
#endif
byte timeouts = TIMEOUTS, deaths = DEATHS, mistakes = MISTAKES;

#define EACH_OP(f) f(STAGE) f(POST) f(PLACE) f(GATHER) f(AG_STAGE) f(AG_POST) f(AG_PLACE) \
  f(AG_POST_ONCE) f(AG_PLACE_ONCE)
#define some_op(k) :: op_of[e] == 0 && IN_OPS(k) -> op_of[e] = k
#define other_op(k) :: mistakes > 0 && me == 0 && IN_OPS(k) && k != op -> op = k; mistakes--

// Epochs go round after EPOCHS rounds and not after 2^32. So a rank makes its old words younger in every round, and not
// in one of 2^28. Nobody may read rows that are two rounds old.
#define REFRESHES (e == AFTER(epoch[me]))  // what is made of an old word is the round before, which nobody waits for
inline refresh() {
#ifndef BUG_UNUSED_WORD
  for (i : 0 .. STEPS * N * N - 1) {
    WHEN(REFRESHES && i / N % N == me && BEHIND(e, word_epoch[i]) == 2, word_epoch[i] = BEHIND(e, 1))
  }
#endif
  for (i : 0 .. N * 2 * N * CHUNKS - 1) {
    WHEN(slot[i] != 0 && slot[i] != GARBAGE && BEHIND(TAG(e), slot[i]) == 2, slot[i] = 0)
  }
  i = 0
}

inline begin() {
  atomic {
    d_step { e = AFTER(epoch[me]); refresh() }
    if
    :: op_of[e] != 0
    EACH_OP(some_op)
    fi;
    op = op_of[e];
#if MISTAKES > 0
    if
    :: true
    EACH_OP(other_op)
    fi;
    called[me * EPOCHS + e] = op;
#endif
    input[me] = (in_place(op) -> TAG(e) : 0)
  }
}

// Both rounds of a call in one kernel, or one after the other.
inline begin_next() {
  d_step { e = AFTER(e); refresh(); op_of[e] = op }
}

inline stage(c) {
  d_step {
    for (i : 0 .. N - 1) {
#ifdef CPU
      slot[CELL(me, SLOT(e), c, i)] = TAG(e)
#else
      WHEN(i != me, slot[CELL(i, SLOT(e), c, me)] = TAG(e))
#endif
    }
    i = 0
  }
}

inline write_own_slot(c) {
  d_step {
    for (i : 0 .. N - 1) { slot[CELL(me, GATHER_SLOT(e), c, i)] = (wrong -> GARBAGE : TAG(e)) }
    i = 0
  }
}

// A row is posted into an inbox that has been cleared.
#define BOX_AT(k, part) inbox[BOX(PEER(k), INBOX(e), part, me)]
inline post_to(k) {
  d_step {
    assert(BOX_AT(k, ADDED) == 0 || mistakes < MISTAKES);
    BOX_AT(k, ADDED) = TAG(e)
  }
}
inline post_normed_to(k) {
  d_step {
    assert(BOX_AT(k, NORMED) == 0 || mistakes < MISTAKES);
    BOX_AT(k, NORMED) = (wrong -> GARBAGE : TAG(e))
  }
}

#if DEATHS > 0
#define MAY_DIE if :: atomic { deaths > 0 && me == 0 -> deaths--; dead[me] = true; goto died } :: true fi
#else
#define MAY_DIE skip
#endif

inline publish_to(k, step) {
  MAY_DIE;
  d_step {
    word_epoch[AT(step, PEER(k), me)] = e;
#if MISTAKES > 0
    word_op[AT(step, PEER(k), me)] = op
#endif
  }
}

#if MISTAKES > 0
#define AGREES(k, step) (word_epoch[AT(step, me, PEER(k))] != e || word_op[AT(step, me, PEER(k))] == op)
#else
#define AGREES(k, step) true
#endif
#define HERE(k, step) REACHED(word_epoch[AT(step, me, PEER(k))], e)
#define GONE(k) (notified[me] || dead[PEER(k)])
#ifdef ONLY_OPENING
#define GIVES_UP(step) (timeouts > 0 && me == 0 && (step) < CLOSE)
#else
#define GIVES_UP(step) (timeouts > 0 && me == 0)
#endif

// Waits for a peer's word. A deadline, a peer that has told this rank that it gave up, and one that has died end the
// wait after one more look. An interruption, on the CPU, ends it at once.
inline observe_from(k, step) {
#if !FAULTS
  HERE(k, step)
#else
  if
  :: atomic { HERE(k, step) && AGREES(k, step) -> skip }
  :: atomic { HERE(k, step) && !AGREES(k, step) -> goto fault }
  :: !HERE(k, step) && GONE(k) -> one_more_look(k, step)
#if TIMEOUTS > 0
  :: !HERE(k, step) && GIVES_UP(step) -> timeouts--; one_more_look(k, step)
#ifdef CPU
  :: atomic { GIVES_UP(step) -> timeouts--; goto fault }
#endif
#endif
  fi
#endif
}

inline one_more_look(k, step) {
  if
  :: atomic { HERE(k, step) && AGREES(k, step) -> skip }
  :: atomic { else -> goto fault }
  fi
}

// The row itself says that it has come. Cleared is what has been read, in the same round.
#define BOX_FROM(k, part) inbox[BOX(me, INBOX(e), part, PEER(k))]
inline take_part_from(k, part) {
  if
  :: d_step {
       BOX_FROM(k, part) != 0 -> check(BOX_FROM(k, part)); right();
#ifndef BUG_CLEAR_LATE
       BOX_FROM(k, part) = 0
#endif
     }
#if FAULTS
  :: BOX_FROM(k, part) == 0 && GONE(k) ->
    if
    :: atomic { BOX_FROM(k, part) == 0 -> goto fault }
    :: d_step { else -> check(BOX_FROM(k, part)); BOX_FROM(k, part) = 0 }
    fi
#endif
#if TIMEOUTS > 0
  :: atomic { BOX_FROM(k, part) == 0 && timeouts > 0 && me == 0 -> timeouts--; goto fault }
#endif
  fi
}
inline take_from(k) { take_part_from(k, ADDED) }
inline take_normed_from(k) { take_part_from(k, NORMED) }

// One after the other, and no peer's before the last one's: as the loops and lanes of csrc may come to it.
#if N == 2
#define EACH(f) f(1)
#define EACH_STEP(f, step) f(1, step)
#elif N == 3
#define EACH(f) f(1); f(2)
#define EACH_STEP(f, step) f(1, step); f(2, step)
#else
#define EACH(f) f(1); f(2); f(3)
#define EACH_STEP(f, step) f(1, step); f(2, step); f(3, step)
#endif
#ifdef AT_ONCE
inline publish(step) { d_step { EACH_STEP(publish_to, step) } }
inline observe(step) { HERE(1, step) && HERE(2, step) && HERE(3, step) }
inline post() { d_step { EACH(post_to) } }
#else
inline publish(step) { EACH_STEP(publish_to, step) }
inline observe(step) { EACH_STEP(observe_from, step) }
inline post() { EACH(post_to) }
#endif
inline take_posted() { EACH(take_from) }
inline gather_posted() { EACH(post_normed_to); EACH(take_normed_from) }

inline check(cell) { WHEN(cell != TAG(e), wrong = true) }

// What a reader takes for the rows of this round is what was written for this round. Where ranks may fail, only a call
// that ends without a fault has to be right.
inline right() {
#if !FAULTS
  assert(!wrong)
#else
  skip
#endif
}

inline read_staged(c) {
  d_step {
    for (i : 0 .. N - 1) {
      if
      :: i == me
#ifdef CPU
      :: i != me -> check(slot[CELL(i, SLOT(e), c, me)])
#else
      :: i != me -> check(slot[CELL(me, SLOT(e), c, i)])
#endif
      fi
    }
    right(); i = 0
  }
}

inline read_in_place() {
  d_step {
    for (i : 0 .. N - 1) { check(input[i]) }
    right(); i = 0
  }
}

inline read_slots(c) {
  d_step {
    for (i : 0 .. N * N - 1) { WHEN(i / N != me, check(slot[CELL(i / N, GATHER_SLOT(e), c, i % N)])) }
    right(); i = 0
  }
}

// Whether a peer has told this rank that it has given up. On the CPU, and when a call begins, that is a fault like any.
// On CUDA a thread that waits for no word looks after the inputs have been read, and the call fails after all waits.
#if FAULTS
#define FAIL_IF_NOTIFIED if :: atomic { notified[me] -> goto fault } :: else fi
#else
#define FAIL_IF_NOTIFIED skip
#endif
#if FAULTS && !defined(CPU) && !defined(BUG_NO_LOOK_AGAIN)
#define LOOK told = notified[me]
#define HEED if :: atomic { told -> goto poisoned } :: else fi
#else
#define LOOK skip
#define HEED skip
#endif

inline close_step() {
  LOOK;
  publish(CLOSE);
  observe(CLOSE);
#if defined(CPU) && !defined(BUG_NO_LOOK_AGAIN)
  FAIL_IF_NOTIFIED
#else
  HEED
#endif
}

inline notify(k) {
  MAY_DIE;
  notified[PEER(k)] = true
}

inline end_round() {
  ended[e]++;
  WHEN(ended[e] == N, ended[e] = 0; op_of[e] = 0);
  epoch[me] = e
}

// A call has ended without a fault.
inline finish() {
#if MISTAKES > 0
  for (i : 0 .. N - 1) { assert(called[i * EPOCHS + first] == op) }
  i = 0;
#endif
  assert(!wrong);
#ifdef LIVE
  odd[me] = !odd[me];
#endif
  input[me] = 0;  // the caller's again
  first = 0
}

proctype Rank(byte me) {
  byte e, first, op, i, chunk;
  bool wrong;
#if FAULTS
  bool told;
#endif
#ifdef BUG_CLEAR_LATE
  bool to_clear;
#endif
  do
  :: begin();
    first = e;
#ifdef CPU
    WHEN(op == GATHER, write_own_slot(0));  // a projection multiplies into its slot before its round begins
#endif
    FAIL_IF_NOTIFIED;
    // The reducing round, or the only one.
#ifdef BUG_PUBLISH_FIRST
    publish(OPEN(0));
#endif
    if
    :: stages(op) -> stage(0)
    :: posts(op) -> post()
#ifndef CPU
    :: op == GATHER -> write_own_slot(0)
#endif
    :: else
    fi;
#ifndef BUG_PUBLISH_FIRST
    publish(OPEN(0));
#endif
#ifdef BUG_CLEAR_LATE
    d_step {
      if
      :: to_clear ->
        for (i : 0 .. N - 1) { inbox[BOX(me, INBOX(e + 1), ADDED, i)] = 0; inbox[BOX(me, INBOX(e + 1), NORMED, i)] = 0 }
        to_clear = false; i = 0
      :: else
      fi
    }
#endif
    do
    :: chunk < CHUNKS ->
      if
      :: chunk + 1 < CHUNKS && stages(op) -> stage(chunk + 1); publish(OPEN(chunk + 1))
      :: chunk + 1 < CHUNKS && op == GATHER -> write_own_slot(chunk + 1); publish(OPEN(chunk + 1))
      :: else
      fi;
      WHEN(chunk == 0 || stages(op) || op == GATHER, observe(OPEN(chunk)));
      if
      :: stages(op) -> read_staged(chunk)
      :: posts(op) && chunk == 0 ->
        take_posted();
#ifdef BUG_CLEAR_LATE
        to_clear = true
#endif
      :: in_place(op) -> read_in_place()
      :: op == GATHER -> read_slots(chunk)
      :: else
      fi;
#ifndef CPU
      WHEN(gathers_after(op), begin_next(); write_own_slot(chunk); publish(GATHER_STEP(chunk)); e = first);
#endif
      chunk++
    :: else -> chunk = 0; break
    od;
#ifndef BUG_NO_CLOSING
    WHEN(closes(op), close_step());
#endif
#ifndef CPU
    if
    :: posts_normed(op) -> gather_posted(); WHEN(in_place(op), LOOK); HEED
    :: else
    fi;
#endif
    if
    :: d_step { !gathers_after(op) -> end_round(); finish() }
    :: d_step { else -> end_round() }
      begin_next();
#ifdef CPU
      write_own_slot(0); publish(GATHER_STEP(0));
#endif
#ifdef BUG_LOOK_EARLY
      WHEN(in_place(op), LOOK);
#endif
      do
      :: chunk < CHUNKS ->
        observe(GATHER_STEP(chunk));
#ifdef BUG_LEAVE_WAITS
        WHEN(in_place(op), LOOK); HEED;
#endif
        read_slots(chunk); chunk++
      :: else -> break
      od;
      chunk = 0;
#ifndef BUG_LOOK_EARLY
      WHEN(in_place(op), LOOK);
#endif
      HEED;
      d_step { end_round(); finish() }
    fi
  od;
fault:
  // The peers are told. Then the caller hears of it, and may do with its input as it likes.
#ifdef BUG_NOTIFIES_LATE
  input[me] = GARBAGE;
#endif
  EACH(notify);
#ifdef BUG_CLOSES_ANYWAY
  WHEN(op == PLACE, EACH_STEP(publish_to, CLOSE));
#endif
#ifdef BUG_CALLS_INTO_SLOT
  wrong = true; write_own_slot(0);
#endif
poisoned:  // CUDA: the peers are told when this rank calls again, if it does
  input[me] = GARBAGE;
died:
  skip
}

init {
  byte i;
  atomic {
    for (i : 0 .. N - 1) { run Rank(i) }
  }
}

#ifdef LIVE
#define MOVES(r) ([]<> odd[r] && []<> !odd[r])
#if N == 4
ltl live { MOVES(0) && MOVES(1) && MOVES(2) && MOVES(3) }
#else
ltl live { MOVES(0) && MOVES(1) && MOVES(2) }
#endif
#endif
