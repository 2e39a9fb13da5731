// SPDX-License-Identifier: Apache-2.0
/*
 * The loops that pay for being watched: fork and wait; posix_spawn, exec and wait; a thread created and joined.
 *
 *     loops PROGRAM [CPU]
 *
 * A line "fork COUNT", "spawn COUNT" or "threads COUNT" on standard input is answered by the nanoseconds that COUNT of them took.
 * PROGRAM is what is executed. With CPU, all of it runs on that processor alone. One process for a whole run: whoever watches, it
 * is the same warm process that is timed.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char *program;
static char *no_environment[] = {NULL};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void wait_for(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child || status)
		fail("loops: waitpid");
}

static void fork_and_wait(void)
{
	pid_t child = fork();

	if (child < 0)
		fail("loops: fork");
	if (!child)
		_exit(0);
	wait_for(child);
}

static void spawn_and_wait(void)
{
	char *arguments[] = {program, NULL};
	pid_t child;

	if (posix_spawn(&child, program, NULL, NULL, arguments, no_environment))
		fail("loops: posix_spawn");
	wait_for(child);
}

static void *nothing(void *unused)
{
	return unused;
}

static void create_and_join(void)
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, nothing, NULL) || pthread_join(thread, NULL))
		fail("loops: pthread_create");
}

static long long now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int argc, char **argv)
{
	char name[16];
	long count;

	if (argc < 2)
		return 2;
	program = argv[1];
	if (argc > 2) {
		cpu_set_t one;

		CPU_ZERO(&one);
		CPU_SET(atoi(argv[2]), &one);
		if (sched_setaffinity(0, sizeof(one), &one))
			fail("loops: sched_setaffinity");
	}
	while (scanf("%15s %ld", name, &count) == 2) {
		void (*once)(void) = !strcmp(name, "fork") ? fork_and_wait : !strcmp(name, "spawn") ? spawn_and_wait : create_and_join;
		long long began = now_ns();

		for (long done = 0; done < count; done++)
			once();
		printf("%lld\n", now_ns() - began);
		fflush(stdout);
	}
	return 0;
}
