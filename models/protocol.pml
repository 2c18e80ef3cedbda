// The protocol of csrc/protocol.h: N ranks that call ops on one workspace for ever. README.md says what is modelled, what
// each step is in csrc, and how to run it.
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

#define EPOCHS 8  // 2^32 in csrc
#define AHEAD 2   // kMostAhead
#define TAG(e) ((e) + 1)
#define GARBAGE (EPOCHS + 1)
#define AFTER(e) (((e) + 1) % EPOCHS)
#define BEHIND(e, f) (((e) + EPOCHS - (f)) % EPOCHS)  // how many rounds f is before e

// The ops, which are the fingerprints too. STAGE .. AG_STAGE: see README.md.
#define STAGE 1
#define POST 2
#define PLACE 3
#define GATHER 4
#define AG_STAGE 5
#define AG_POST 6
#define AG_PLACE 7
#define IN_OPS(k) ((OPS >> (k)) & 1)
#define posts(k) ((k) == POST || (k) == AG_POST)
#define in_place(k) ((k) == PLACE || (k) == AG_PLACE)
#define stages(k) ((k) == STAGE || (k) == AG_STAGE)
#define gathers_after(k) ((k) >= AG_STAGE)

// The steps of a round, each with a word from every rank to every other.
#define OPEN(c) (c)
#ifdef CPU
#define LAID_OPEN(c) (c)  // the CPU's second round meets as its first does
#else
#define LAID_OPEN(c) (CHUNKS + (c))
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

// Symmetric memory. A slot has a cell for every source and chunk; rows that are laid open take all cells of a chunk.
byte word_epoch[STEPS * N * N], word_op[STEPS * N * N];
byte slot[N * 2 * N * CHUNKS];
byte inbox[N * 2 * N];
byte input[N];  // that peers read in place
byte epoch[N];  // rounds finished
bool faulted[N], dead[N];
#define AT(step, to, from) (((step) * N + (to)) * N + (from))
#define CELL(owner, half, chunk, source) ((((owner) * 2 + (half)) * CHUNKS + (chunk)) * N + (source))
#define BOX(owner, half, source) (((owner) * 2 + (half)) * N + (source))

// What no rank looks at: the op that the ranks call in a round, how many have ended it, what each has called.
byte op_of[4], ended[4], called[N * 4];
bool odd[N];  // calls finished
byte timeouts = TIMEOUTS, deaths = DEATHS, mistakes = MISTAKES;

#define some_op(k) op_of[e & 3] == 0 && IN_OPS(k) -> op_of[e & 3] = k
#define other_op(k) mistakes > 0 && IN_OPS(k) && k != op -> op = k; mistakes--

// Epochs go round after EPOCHS rounds and not after 2^32. So a word or a row that has not been written for three rounds
// is kept three rounds old: in csrc none comes to be 2^32 rounds old.
inline keep_young() {
#ifndef NEVER_YOUNG
  for (i : 0 .. STEPS * N * N - 1) {
    if
    :: BEHIND(e, word_epoch[i]) >= 3 && BEHIND(e, word_epoch[i]) <= 5 ->
      word_epoch[i] = (e + EPOCHS - 3) % EPOCHS; word_op[i] = 0
    :: else
    fi
  }
#endif
  for (i : 0 .. N * 2 * N * CHUNKS - 1) {
    if
    :: slot[i] != GARBAGE && BEHIND(TAG(e), slot[i]) >= 3 && BEHIND(TAG(e), slot[i]) <= 5 -> slot[i] = 0
    :: else
    fi
  }
}

inline begin() {
  atomic {
    e = AFTER(epoch[me]);
    if
    :: op_of[e & 3] != 0
    :: some_op(STAGE)
    :: some_op(POST)
    :: some_op(PLACE)
    :: some_op(GATHER)
    :: some_op(AG_STAGE)
    :: some_op(AG_POST)
    :: some_op(AG_PLACE)
    fi;
    op = op_of[e & 3];
    if
    :: true
    :: other_op(STAGE)
    :: other_op(PLACE)
    :: other_op(GATHER)
    :: other_op(AG_STAGE)
    fi;
    d_step {
      keep_young();
      called[me * 4 + (e & 3)] = op;
      input[me] = (in_place(op) -> TAG(e) : 0);
      assert(!faulted[me]);
      i = 0
    }
  }
}

inline stage(chunk) {
  d_step {
    for (i : 0 .. N - 1) {
      if
#ifdef CPU
      :: slot[CELL(me, SLOT(e), chunk, i)] = TAG(e)
#else
      :: i != me -> slot[CELL(i, SLOT(e), chunk, me)] = TAG(e)
      :: else
#endif
      fi
    }
    i = 0
  }
}

// Rows go into the inboxes one after the other.
inline post() {
  for (i : 0 .. N - 1) {
    if
    :: i != me -> assert(inbox[BOX(i, INBOX(e), me)] == 0 || mistakes < MISTAKES); inbox[BOX(i, INBOX(e), me)] = TAG(e)
    :: else
    fi
  }
}

inline lay_open(chunk) {
  d_step {
    for (i : 0 .. N - 1) { slot[CELL(me, GATHER_SLOT(e), chunk, i)] = (wrong -> GARBAGE : TAG(e)) }
    i = 0
  }
}

inline publish(step) {
#ifdef PUBLISH_AT_ONCE
  d_step {
#endif
  for (i : 0 .. N - 1) {
    if
    :: i == me
#if DEATHS > 0
    :: i != me && deaths > 0 -> atomic { deaths--; dead[me] = true; goto died }
#endif
    :: i != me -> d_step { word_epoch[AT(step, i, me)] = e; word_op[AT(step, i, me)] = op }
    fi
  }
#ifdef PUBLISH_AT_ONCE
  ; i = 0 }
#endif
}

#define SEEN word_epoch[AT(step, me, i)]

// Waits for each peer's word. A deadline, and a peer that has faulted or died, end the wait after one more look.
inline observe(step) {
  for (i : 0 .. N - 1) {
    if
    :: i == me
    :: i != me && REACHED(SEEN, e)
    :: i != me && !REACHED(SEEN, e) && (faulted[i] || dead[i])
#if TIMEOUTS > 0
    :: i != me && !REACHED(SEEN, e) && timeouts > 0 -> timeouts--
#endif
    fi;
    if
    :: i != me && (!REACHED(SEEN, e) || (SEEN == e && word_op[AT(step, me, i)] != op)) -> goto fault
    :: else
    fi
  }
}

inline expect(cell) {
  if
  :: cell != TAG(e) -> wrong = true
  :: else
  fi
}

// What a reader takes for the rows of this round is what was written for this round.
inline right() {
#if TIMEOUTS == 0 && DEATHS == 0
  assert(!wrong)
#else
  skip
#endif
}

inline read_staged(chunk) {
  d_step {
    for (i : 0 .. N - 1) {
      if
      :: i == me
#ifdef CPU
      :: i != me -> expect(slot[CELL(i, SLOT(e), chunk, me)])
#else
      :: i != me -> expect(slot[CELL(me, SLOT(e), chunk, i)])
#endif
      fi
    }
    right(); i = 0
  }
}

inline read_in_place() {
  d_step {
    for (i : 0 .. N - 1) { expect(input[i]) }
    right(); i = 0
  }
}

inline read_laid_open(chunk) {
  d_step {
    for (i : 0 .. N * N - 1) {
      if
      :: i / N != me -> expect(slot[CELL(i / N, GATHER_SLOT(e), chunk, i % N)])
      :: else
      fi
    }
    right(); i = 0
  }
}

// The row itself says that it has come.
inline take_posted() {
  for (i : 0 .. N - 1) {
    if
    :: i == me
    :: i != me && inbox[BOX(me, INBOX(e), i)] != 0
    :: i != me && inbox[BOX(me, INBOX(e), i)] == 0 && (faulted[i] || dead[i]) ->
      if
      :: inbox[BOX(me, INBOX(e), i)] == 0 -> goto fault
      :: else
      fi
#if TIMEOUTS > 0
    :: i != me && inbox[BOX(me, INBOX(e), i)] == 0 && timeouts > 0 -> timeouts--; goto fault
#endif
    fi;
    d_step {
      if
      :: i != me -> expect(inbox[BOX(me, INBOX(e), i)])
      :: else
      fi;
      right()
    }
  }
}

inline clear_posted(round) {
  d_step {
    for (i : 0 .. N - 1) { inbox[BOX(me, INBOX(round), i)] = 0 }
    i = 0
  }
}

#ifdef LOOK_AGAIN
#define look_again() look_at_flags()
#else
#define look_again() skip
#endif

// Whether a peer has given up.
inline look_at_flags() {
  for (i : 0 .. N - 1) {
    if
    :: faulted[i] -> goto fault
    :: else
    fi
  }
}

inline end_round() {
  d_step {
    ended[e & 3]++;
    if
    :: ended[e & 3] == N -> ended[e & 3] = 0; op_of[e & 3] = 0
    :: else
    fi;
    epoch[me] = e
  }
}

// A call has ended without a fault.
inline finish() {
  d_step {
    for (i : 0 .. N - 1) { assert(called[i * 4 + (first & 3)] == op) }  // all have called the same in its first round
    i = 0;
#ifdef STRICT
    assert(!wrong);
#endif
    assert(!was_wrong);  // at the latest the next call hears of it
    was_wrong = wrong; wrong = false;
    input[me] = 0;  // the input is the caller's again
    odd[me] = !odd[me]
  }
}

proctype Rank(byte me) {
  byte e, first, op, i, chunk;
  bool wrong, was_wrong;
#ifdef BUG_CLEAR_LATE
  bool to_clear;
#endif
  do
  :: begin();
    first = e;
#ifdef CPU
    look_at_flags();
#endif
    // The reducing round, or the only one.
#ifdef BUG_PUBLISH_FIRST
    publish(OPEN(0));
#endif
    if
    :: stages(op) -> stage(0)
    :: posts(op) -> post()
    :: op == GATHER -> lay_open(0)
    :: else
    fi;
#ifndef BUG_PUBLISH_FIRST
    publish(OPEN(0));
#endif
#ifdef BUG_CLEAR_LATE
    if
    :: to_clear -> clear_posted(e + 1); to_clear = false
    :: else
    fi;
#endif
    for (chunk : 0 .. CHUNKS - 1) {
      if
      :: chunk + 1 < CHUNKS && stages(op) -> stage(chunk + 1); publish(OPEN(chunk + 1))
      :: chunk + 1 < CHUNKS && op == GATHER -> lay_open(chunk + 1); publish(OPEN(chunk + 1))
      :: else
      fi;
      if
      :: chunk == 0 || stages(op) || op == GATHER -> observe(OPEN(chunk))
      :: else
      fi;
      if
      :: stages(op) -> read_staged(chunk)
      :: posts(op) && chunk == 0 ->
        take_posted();
#ifdef BUG_CLEAR_LATE
        to_clear = true
#else
        clear_posted(e)
#endif
      :: in_place(op) && chunk == 0 -> read_in_place()
      :: op == GATHER -> read_laid_open(chunk)
      :: else
      fi;
#ifndef CPU
      if
      :: gathers_after(op) ->
        e = AFTER(e); lay_open(chunk); publish(LAID_OPEN(chunk)); e = first
      :: else
      fi
#endif
    }
    chunk = 0;
#ifndef BUG_NO_CLOSING
#ifdef CPU
    if
    :: in_place(op) -> publish(CLOSE); observe(CLOSE); look_again()
#else
    if
    :: op == PLACE -> publish(CLOSE); observe(CLOSE); look_again()
#endif
    :: else
    fi;
#endif
    end_round();
    // The gathering round.
    if
    :: gathers_after(op) ->
      e = AFTER(e);
#ifdef CPU
      d_step {
        called[me * 4 + (e & 3)] = op;
        op_of[e & 3] = op
      }
      lay_open(0); publish(LAID_OPEN(0));
#else
      op_of[e & 3] = op;
#endif
      for (chunk : 0 .. CHUNKS - 1) { observe(LAID_OPEN(chunk)); read_laid_open(chunk) }
      chunk = 0;
#ifndef CPU
      if
      :: in_place(op) -> look_again()
      :: else
      fi;
#endif
      end_round()
    :: else
    fi;
    finish()
  od;
fault:
  // The record, then the flag; then the caller hears of it, and may do as it likes with its input.
  faulted[me] = true;
#ifdef BUG_CLOSES_ANYWAY
  if
  :: op == PLACE -> publish(CLOSE)
  :: else
  fi;
#endif
  input[me] = GARBAGE;
#ifdef BUG_CALLS_INTO_SLOT
  lay_open(0);
#endif
died:
  skip
}

init {
  byte i;
  atomic {
    for (i : 0 .. N - 1) { run Rank(i) }
  }
}

#define MOVES(r) ([]<> odd[r] && []<> !odd[r])
#ifdef LIVE
#if N == 3
ltl live { MOVES(0) && MOVES(1) && MOVES(2) }
#else
ltl live { MOVES(0) && MOVES(1) && MOVES(2) && MOVES(3) }
#endif
#endif
