// SPDX-License-Identifier: Apache-2.0
// Scenes of threads in processes whose first thread ends last.
#define _GNU_SOURCE
#include "truth.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void *sleep_for_good(struct worker *worker)
{
	(void)worker;
	for (;;)
		pause();
}

static void *enter(void *argument)
{
	struct worker *worker = argument;
	char byte;

	worker->tid = host_tid();
	if (write(worker->ready[1], "t", 1) != 1 || read(worker->ready[1], &byte, 1) != 1)
		die("worker");
	close(worker->ready[1]);
	return worker->run ? worker->run(worker) : NULL;
}

/* The thread is told of before it does anything: it may end the process. */
void start_worker(struct worker *worker, void *(*run)(struct worker *))
{
	pthread_t handle;
	char byte;

	worker->run = run;
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, worker->ready))
		die("socketpair");
	if (pthread_create(&handle, NULL, enter, worker))
		die("pthread_create");
	worker->handle = handle;
	if (read(worker->ready[0], &byte, 1) != 1)
		die("worker did not start");
	tell("{\"type\":\"THREAD_CREATE\",\"pid\":%d,\"tid\":%d,\"child_pid\":%d,\"child_tid\":%d}", host_pid(), host_tid(), host_pid(), worker->tid);
	if (write(worker->ready[0], "g", 1) != 1)
		die("write");
	close(worker->ready[0]);
}

void tell_thread_end(pid_t pid, pid_t tid, int status)
{
	if (status == -1)
		tell("{\"type\":\"THREAD_EXIT\",\"pid\":%d,\"tid\":%d}", pid, tid);
	else if (WIFEXITED(status))
		tell("{\"type\":\"THREAD_EXIT\",\"pid\":%d,\"tid\":%d,\"exit_code\":%d}", pid, tid, WEXITSTATUS(status));
	else
		for (int i = 0; i < 2; i++)
			tell("{\"type\":\"THREAD_%s\",\"pid\":%d,\"tid\":%d,\"exit_signal\":%d}", i ? "EXIT" : "ABORT", pid, tid, WTERMSIG(status));
}

void join_worker(struct worker *worker, int code)
{
	if (pthread_join((pthread_t)worker->handle, NULL))
		die("pthread_join");
	tell_thread_end(host_pid(), worker->tid, code << 8);
}

static void *end_raw(struct worker *worker)
{
	syscall(SYS_exit, worker->value);
	return NULL;
}

static void *nest(struct worker *worker)
{
	struct worker inner;

	(void)worker;
	start_worker(&inner, NULL);
	join_worker(&inner, 0);
	return NULL;
}

static int play_threads(int argc, char **argv)
{
	struct worker workers[4];

	(void)argc, (void)argv;
	for (int i = 0; i < 4; i++)
		start_worker(&workers[i], NULL);
	for (int i = 0; i < 4; i++)
		join_worker(&workers[i], 0);
	for (int i = 0; i < 4; i++) { /* _exit(2) of a thread, with a code */
		workers[i].value = i;
		start_worker(&workers[i], end_raw);
		join_worker(&workers[i], i);
	}
	start_worker(&workers[0], nest);
	join_worker(&workers[0], 0);
	return 0;
}

static void *fork_here(struct worker *worker)
{
	pid_t child = told_fork();

	(void)worker;
	if (child == 0) {
		pid_t grandchild = told_fork();

		if (grandchild == 0)
			_exit(2);
		reap(grandchild);
		_exit(1);
	}
	reap(child);
	return NULL;
}

/* fork by a thread that is not the first: the child is the process's. */
static int play_thread_forks(int argc, char **argv)
{
	struct worker worker;

	(void)argc, (void)argv;
	start_worker(&worker, fork_here);
	join_worker(&worker, 0);
	return 0;
}

static void *exit_group(struct worker *worker)
{
	tell_thread_end(host_pid(), worker->tid, 8 << 8);
	exit(8);
}

static void *fault(struct worker *worker)
{
	volatile int *volatile nowhere = NULL;

	tell_thread_end(host_pid(), worker->tid, SIGSEGV);
	*nowhere = 0;
	return NULL;
}

/* Three threads and the first; then the process ends in one of several ways. */
static int play_thread_abort(int argc, char **argv)
{
	const char *way = argc ? argv[0] : "";
	int all_there[2];
	pid_t child, tids[3];
	int status;

	if (pipe(all_there))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		struct worker workers[4];

		for (int i = 0; i < 3; i++) {
			start_worker(&workers[i], sleep_for_good);
			tids[i] = workers[i].tid;
		}
		if (*way == 'e' || *way == 'f') {
			for (int i = 0; i < 3; i++)
				tell_thread_end(host_pid(), tids[i], *way == 'e' ? 8 << 8 : SIGSEGV);
			start_worker(&workers[3], *way == 'e' ? exit_group : fault);
		} else if (write(all_there[1], tids, sizeof(tids)) != sizeof(tids)) {
			die("write");
		}
		for (;;)
			pause();
	}
	close(all_there[1]);
	if (*way != 'e' && *way != 'f') {
		char more[128];

		if (read(all_there[0], tids, sizeof(tids)) != sizeof(tids))
			die("read");
		kill(child, atoi(way));
		if (waitpid(child, &status, 0) != child)
			die("waitpid");
		for (int i = 0; i < 3; i++)
			tell_thread_end(child, tids[i], status);
		snprintf(more, sizeof(more), ",\"killed_by\":{\"pid\":%d,\"comm\":\"truth\",\"uid\":%d}", getpid(), getuid());
		tell_end(child, OPEN_TID, status, more);
		return 0;
	}
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	tell_end(child, OPEN_TID, status, "");
	return 0;
}

/* One of each type, the last of which is an abort and an exit of a child. */
static int play_mixed(int argc, char **argv)
{
	struct worker worker;
	pid_t child;

	(void)argc, (void)argv;
	start_worker(&worker, NULL);
	join_worker(&worker, 0);
	child = told_fork();
	if (child == 0)
		exec_end("/proc/self/exe", 3);
	reap(child);
	child = told_fork();
	if (child == 0)
		raise(SIGKILL);
	reap(child);
	return 0;
}

const struct scene thread_scenes[] = {
	{"mixed", play_mixed},
	{"threads", play_threads},
	{"thread_forks", play_thread_forks},
	{"thread_abort", play_thread_abort},
	{0},
};
