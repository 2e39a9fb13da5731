// SPDX-License-Identifier: Apache-2.0
// Scenes of fork and of ends by exit: who has whom as a child, and who waits when.
#define _GNU_SOURCE
#include "truth.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int play_codes(int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		pid_t child = told_fork();

		if (child == 0)
			_exit(atoi(argv[i]));
		reap(child);
	}
	return 0;
}

static int play_vfork(int argc, char **argv)
{
	pid_t child = vfork();

	(void)argc, (void)argv;
	if (child == 0)
		exec_end("/proc/self/exe", 4);
	tell_fork(child);
	reap(child);
	child = vfork();
	if (child == 0)
		_exit(5);
	tell_fork(child);
	reap(child);
	return 0;
}

/* A chain of generations, each waiting for the next. */
static int play_generations(int argc, char **argv)
{
	int depth = argc ? atoi(argv[0]) : 6;
	int generation = 0;
	pid_t child = 0;

	while (generation < depth && (child = told_fork()) == 0)
		generation++;
	if (generation < depth)
		reap(child);
	if (generation)
		_exit(generation);
	return 0;
}

/* Many at a time, let go together. */
static int play_many(int argc, char **argv)
{
	int count = argc ? atoi(argv[0]) : 200;
	pid_t children[1000];
	int gate[2];

	if (count > 1000 || pipe(gate))
		die("pipe");
	for (int i = 0; i < count; i++) {
		children[i] = told_fork();
		if (children[i] == 0) {
			close(gate[1]);
			ended(gate[0]);
			_exit(i % 256);
		}
	}
	close(gate[1]);
	for (int i = 0; i < count; i++)
		reap(children[i]);
	return 0;
}

/* The child is a zombie until the harness, which has been told of the end meanwhile, says so. */
static int play_zombie(int argc, char **argv)
{
	pid_t child = told_fork();
	siginfo_t info;

	(void)argc, (void)argv;
	if (child == 0)
		_exit(9);
	if (waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT))
		die("waitid");
	tell("{\"zombie\":%d}", child);
	wait_word();
	reap(child);
	return 0;
}

/* Fork twice: the grandchild loses its parent, and ends when it has another one. */
static int double_fork(bool subreaper)
{
	int orphaned[2], gone[2];
	pid_t child, grandchild;
	int status;

	if (subreaper && prctl(PR_SET_CHILD_SUBREAPER, 1))
		die("prctl");
	if (pipe(orphaned) || pipe(gone))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		setsid();
		grandchild = told_fork();
		if (grandchild)
			_exit(0);
		close(orphaned[1]);
		close(gone[0]);
		ended(orphaned[0]);
		if (!subreaper) /* nobody here will wait for it: its own word */
			tell("{\"type\":\"PROCESS_EXIT\",\"pid\":%d,\"tid\":%d,\"ppid\":%d,\"exit_code\":6}", getpid(), getpid(), getppid());
		_exit(6);
	}
	reap(child);
	close(orphaned[1]);
	close(gone[1]);
	if (subreaper) {
		char more[64];

		grandchild = waitpid(-1, &status, 0);
		snprintf(more, sizeof(more), ",\"ppid\":%d", getpid());
		tell_end(grandchild, grandchild, status, more);
	}
	ended(gone[0]);
	return 0;
}

static int play_daemon(int argc, char **argv)
{
	(void)argc, (void)argv;
	return double_fork(false);
}

static int play_subreaper(int argc, char **argv)
{
	(void)argc, (void)argv;
	return double_fork(true);
}

/* A child makes a sibling of itself: made by the child, waited for by the root. */
static int play_clone_parent(int argc, char **argv)
{
	int gate[2];
	pid_t child, sibling;
	int status;

	(void)argc, (void)argv;
	if (pipe(gate))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		/* With CLONE_PARENT the exit signal is the caller's own: SIGCHLD. */
		sibling = (pid_t)syscall(SYS_clone, CLONE_PARENT, 0, 0, 0, 0);
		if (sibling < 0)
			die("clone");
		if (sibling == 0) {
			close(gate[1]);
			ended(gate[0]); /* not before the other has told */
			_exit(12);
		}
		tell_fork(sibling);
		_exit(11);
	}
	close(gate[0]);
	reap(child);
	close(gate[1]);
	sibling = waitpid(-1, &status, 0);
	tell_end(sibling, sibling, status, "");
	return 0;
}

/* Pids of a child pid namespace, told as the root's namespace has them. The child is its init. */
static int play_namespace(int argc, char **argv)
{
	bool kill_init = argc && atoi(argv[0]);
	int inside[2], outside[2];
	pid_t init, inner, told;
	int status;

	if (pipe(inside) || pipe(outside))
		die("pipe");
	init = (pid_t)syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0);
	if (init < 0)
		die("clone");
	if (init == 0) {
		struct worker worker;

		if (getpid() != 1)
			die("not in a namespace of its own");
		start_worker(&worker, NULL);
		join_worker(&worker, 0);
		inner = fork();
		if (inner == 0) {
			told = host_pid();
			if (write(inside[1], &told, sizeof(told)) != sizeof(told))
				die("write");
			if (kill_init)
				pause();
			_exit(21);
		}
		if (read(inside[0], &told, sizeof(told)) != sizeof(told))
			die("read");
		tell_fork(told);
		if (kill_init) {
			if (write(outside[1], &told, sizeof(told)) != sizeof(told))
				die("write");
			pause();
		}
		if (waitpid(inner, &status, 0) != inner)
			die("waitpid");
		tell_end(told, told, status, "");
		_exit(22);
	}
	tell_fork(init);
	if (kill_init) {
		if (read(outside[0], &told, sizeof(told)) != sizeof(told))
			die("read");
		kill(init, SIGKILL);
	}
	reap(init);
	if (kill_init) /* pid_namespaces(7): all of the namespace are killed, and gone before its init is */
		tell_end(told, told, SIGKILL, "");
	return 0;
}

const struct scene family_scenes[] = {
	{"codes", play_codes},
	{"vfork", play_vfork},
	{"generations", play_generations},
	{"many", play_many},
	{"zombie", play_zombie},
	{"daemon", play_daemon},
	{"subreaper", play_subreaper},
	{"clone_parent", play_clone_parent},
	{"namespace", play_namespace},
	{0},
};
