/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A workload that knows its own truth: it plays a scene with real processes and writes each event
 * that a complete monitor must have seen as one JSON line on standard output.
 *
 * A line's keys are those of `kmon watch --json`; a key that is left out is one that POSIX and the
 * kernel leave open in that scene. Each line is one write(2), so that lines of several processes do not mix.
 */
#ifndef TRUTH_H
#define TRUTH_H

#include <stdbool.h>
#include <sys/types.h>

struct scene {
	const char *name;
	int (*play)(int argc, char **argv); /* its value is the exit code of the root */
};

extern const struct scene family_scenes[], exec_scenes[], thread_scenes[], leader_scenes[], signal_scenes[], killer_scenes[];

/* truth.c */
void die(const char *what) __attribute__((noreturn));
void tell(const char *format, ...) __attribute__((format(printf, 1, 2)));
char *quote(char *to, const char *end, const char *text); /* as a JSON string; returns its end */
void tell_fork(pid_t child);
void tell_exec(int argc, char **argv);
void tell_exec_of(pid_t pid, const char *filename, int argc, char **argv);

enum { OPEN_TID = 0 }; /* which thread was the last of its process is open */
/* The end of a child, with the status that waitpid gave. `more` is further keys, such as ",\"oom_killed\":true". */
void tell_end(pid_t pid, pid_t tid, int status, const char *more);
int reap(pid_t pid);          /* waitpid, and tell */
void ended(int fd);           /* wait until nobody has the other end of a pipe any more */
void wait_word(void);         /* for a line on standard input */
pid_t told_fork(void);        /* fork, and tell in the parent */
pid_t host_pid(void);         /* of the caller, as the mounted /proc has it: also from a child pid namespace */
pid_t host_tid(void);
void exec_end(const char *filename, int code) __attribute__((noreturn)); /* exec this program as `truth end CODE` */
void nap_ms(int ms);

/* truth_signals.c */
void fall(int number); /* Die of the signal as programs do. Returns for one that has no cause but somebody who sends it. */

void stay_on_one(void); /* of the processors that it may have */

/* truth_threads.c */
struct worker {
	pid_t tid;
	unsigned long handle;
	void *(*run)(struct worker *);
	int ready[2]; /* a socket pair: the creator's end, the thread's end */
	int value;
};
void start_worker(struct worker *worker, void *(*run)(struct worker *)); /* pthread_create, and tell */
void join_worker(struct worker *worker, int code);                       /* pthread_join, and tell */
void tell_thread_end(pid_t pid, pid_t tid, int status);                  /* status as waitpid has it; -1: open */
void *sleep_for_good(struct worker *worker);

#endif
