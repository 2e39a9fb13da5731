// SPDX-License-Identifier: Apache-2.0
// Scenes in which the first thread of a process is not its last, or not for sure.
#define _GNU_SOURCE
#include "truth.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum ending { ENDS_BY_EXIT_OF_THREAD, ENDS_BY_EXIT_GROUP, ENDS_BY_RETURN, ENDS_BY_SIGNAL };

static enum ending ending;
static int gate[2];

/* The first thread is a zombie when the state in /proc says so: its end is complete. */
static void wait_for_leader_end(void)
{
	char text[512], *state;

	for (;;) {
		FILE *file = fopen("/proc/self/stat", "r");
		size_t size = file ? fread(text, 1, sizeof(text) - 1, file) : 0;

		if (file)
			fclose(file);
		text[size] = 0;
		state = strrchr(text, ')');
		if (state && state[2] == 'Z')
			return;
		nap_ms(1);
	}
}

static void *outlive(struct worker *worker)
{
	wait_for_leader_end();
	tell("{\"outlived\":%d}", worker->tid);
	ended(gate[0]);
	switch (ending) {
	case ENDS_BY_EXIT_OF_THREAD:
		tell_thread_end(host_pid(), worker->tid, 3 << 8);
		syscall(SYS_exit, 3);
		break;
	case ENDS_BY_EXIT_GROUP:
		tell_thread_end(host_pid(), worker->tid, 7 << 8);
		exit(7);
	case ENDS_BY_RETURN:
		tell_thread_end(host_pid(), worker->tid, 0);
		break;
	case ENDS_BY_SIGNAL:
		tell_thread_end(host_pid(), worker->tid, SIGTERM);
		tell("{\"lives\":%d}", worker->tid);
		sleep_for_good(worker);
	}
	return NULL;
}

/* The first thread ends with code 5, and the process lives on until the harness, told so, says a word. */
static int play_leader_first(int argc, char **argv)
{
	pid_t child;
	int status;

	ending = argc ? (enum ending)atoi(argv[0]) : ENDS_BY_EXIT_OF_THREAD;
	if (pipe(gate))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		static struct worker worker;

		close(gate[1]);
		start_worker(&worker, outlive);
		if (ending == ENDS_BY_RETURN)
			pthread_exit(NULL);
		syscall(SYS_exit, 5);
	}
	close(gate[0]);
	wait_word();
	close(gate[1]);
	if (ending == ENDS_BY_SIGNAL) {
		wait_word(); /* the harness has seen that it lives */
		kill(child, SIGTERM);
	}
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	tell_end(child, OPEN_TID, status, "");
	return 0;
}

static atomic_int at_the_line;

static void start_together(int runners)
{
	atomic_fetch_add(&at_the_line, 1);
	while (atomic_load(&at_the_line) < runners)
		;
}

static bool by_group;

static void *run_out(struct worker *worker)
{
	tell_thread_end(getpid(), worker->tid, by_group ? -1 : 2 << 8);
	start_together(2);
	syscall(by_group ? SYS_exit_group : SYS_exit, 2);
	return NULL;
}

/* Both threads of a process end in the same moment, many times. */
static int play_together(int argc, char **argv)
{
	int count = argc ? atoi(argv[0]) : 200;

	by_group = argc > 1 && atoi(argv[1]);
	for (int i = 0; i < count; i++) {
		pid_t child = told_fork();
		int status;

		if (child == 0) {
			static struct worker worker;

			start_worker(&worker, run_out);
			start_together(2);
			syscall(by_group ? SYS_exit_group : SYS_exit, 1);
		}
		if (waitpid(child, &status, 0) != child)
			die("waitpid");
		tell_end(child, OPEN_TID, status, "");
	}
	return 0;
}

const struct scene leader_scenes[] = {
	{"leader_first", play_leader_first},
	{"together", play_together},
	{0},
};
