// SPDX-License-Identifier: Apache-2.0
// Scenes of ends by signal: each that can end a process, by a real fault where there is one, and from whom.
#define _GNU_SOURCE
#include "truth.h"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

/* Make a filter of system calls end this process at its next getppid(2). */
static void forbid_getppid(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0)
		prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

void fall(int number)
{
	volatile int *volatile nowhere = NULL;
	volatile int zero = 0;
	int ends[2], fd;
	char name[] = "short XXXXXX";

	switch (number) {
	case SIGSEGV:
		*nowhere = 0;
		break;
	case SIGFPE:
		zero = 100 / zero; /* a trap on x86; elsewhere it goes on, and sends it */
		break;
	case SIGILL:
		__builtin_trap();
	case SIGBUS: /* a page beyond the end of its file */
		fd = mkstemp(name);
		unlink(name);
		*(volatile char *)mmap(NULL, 4096, PROT_WRITE, MAP_SHARED, fd, 0) = 1;
		break;
	case SIGTRAP:
#if defined(__x86_64__) || defined(__i386__)
		__asm__ volatile("int3");
#elif defined(__aarch64__)
		__asm__ volatile("brk #0");
#endif
		break;
	case SIGSYS:
		forbid_getppid();
		syscall(SYS_getppid);
		break;
	case SIGABRT:
		abort();
	case SIGPIPE:
		if (pipe(ends) == 0 && close(ends[0]) == 0 && write(ends[1], "", 1) < 0)
			return;
		break;
	case SIGALRM:
		setitimer(ITIMER_REAL, &(struct itimerval){.it_value.tv_usec = 1000}, NULL);
		pause();
		break;
	case SIGXFSZ:
		setrlimit(RLIMIT_FSIZE, &(struct rlimit){0, 0});
		fd = mkstemp(name);
		unlink(name);
		if (write(fd, "x", 1) < 0)
			return;
		break;
	default:
		break;
	}
}

static bool ends_a_process(int number)
{
	switch (number) {
	case SIGCHLD:
	case SIGCONT:
	case SIGSTOP:
	case SIGTSTP:
	case SIGTTIN:
	case SIGTTOU:
	case SIGURG:
	case SIGWINCH:
		return false;
	default:
		return number < 32 || number >= SIGRTMIN; /* 32 and 33 are glibc's own */
	}
}

/* signals CORE_LIMIT: a child for each signal that ends processes. */
static int play_signals(int argc, char **argv)
{
	rlim_t limit = argc ? (rlim_t)atol(argv[0]) : 0;

	for (int number = 1; number <= SIGRTMAX; number++) {
		struct sigaction was;
		pid_t child;

		if (!ends_a_process(number))
			continue;
		child = told_fork();
		if (child == 0) {
			setrlimit(RLIMIT_CORE, &(struct rlimit){limit, limit});
			if (number != SIGKILL && (sigaction(number, NULL, &was) || was.sa_handler != SIG_DFL))
				signal(number, SIG_DFL);
			fall(number);
			kill(getpid(), number);
			die("still there");
		}
		reap(child);
		unlink("core"); /* if it is called so */
	}
	return 0;
}

static void reap_killed(pid_t child)
{
	char more[160];
	int status;

	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	snprintf(more, sizeof(more), ",\"ppid\":%d,\"killed_by\":{\"pid\":%d,\"comm\":\"truth\",\"uid\":%d}", getpid(), getpid(), getuid());
	tell_end(child, child, status, more);
}

/* The root sends it, in every way there is. */
static int play_killers(int argc, char **argv)
{
	(void)argc, (void)argv;
	for (int way = 0; way < 6; way++) {
		pid_t child = told_fork();
		int fd;

		if (child == 0)
			for (;;)
				pause();
		switch (way) {
		case 0:
			kill(child, SIGTERM);
			break;
		case 1:
			syscall(SYS_tgkill, child, child, SIGUSR1);
			break;
		case 2:
			sigqueue(child, SIGRTMIN + 3, (union sigval){.sival_int = 5});
			break;
		case 3:
			fd = (int)syscall(SYS_pidfd_open, child, 0);
			syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0);
			close(fd);
			break;
		case 4:
			kill(child, SIGRTMAX);
			break;
		default: /* stopped when it comes */
			kill(child, SIGSTOP);
			waitpid(child, &fd, WUNTRACED);
			kill(child, SIGKILL);
		}
		reap_killed(child);
	}
	return 0;
}

/* A signal that is caught, and one that is ignored, are no causes of an end by exit. */
static volatile sig_atomic_t caught;

static void catch(int number)
{
	caught = number;
}

static int play_caught(int argc, char **argv)
{
	int gate[2];
	pid_t child;

	(void)argc, (void)argv;
	if (pipe(gate))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		close(gate[0]);
		signal(SIGTERM, catch);
		signal(SIGUSR1, SIG_IGN);
		close(gate[1]);
		while (!caught)
			nap_ms(1);
		_exit(18);
	}
	close(gate[1]);
	ended(gate[0]);
	kill(child, SIGUSR1);
	kill(child, SIGTERM);
	reap(child);
	return 0;
}

static void enter_group(const char *procs)
{
	int fd = open(procs, O_WRONLY);

	if (fd < 0 || write(fd, "0", 1) != 1 || close(fd))
		die("control group");
}

static void take_memory(size_t bytes)
{
	char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	memset(memory, 1, bytes);
}

/* oom CGROUP_PROCS_FILE [THREADS]: a child with so many further threads enters a control group with little memory, and takes much. */
static int play_oom(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 0, status, all_there[2];
	char more[64];
	pid_t child, tid;

	if (argc < 1 || pipe(all_there))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		static struct worker workers[8];

		enter_group(argv[0]);
		for (int i = 0; i < threads; i++) {
			start_worker(&workers[i], sleep_for_good);
			if (write(all_there[1], &workers[i].tid, sizeof(pid_t)) != sizeof(pid_t))
				die("write");
		}
		for (;;)
			take_memory(1 << 20);
	}
	close(all_there[1]);
	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	while (read(all_there[0], &tid, sizeof(tid)) == sizeof(tid))
		tell_thread_end(child, tid, status);
	snprintf(more, sizeof(more), ",\"ppid\":%d,\"oom_killed\":true", getpid());
	tell_end(child, threads ? OPEN_TID : child, status, more);
	return 0;
}

void stay_on_one(void)
{
	cpu_set_t all, one;
	int cpu = 0;

	if (sched_getaffinity(0, sizeof(all), &all))
		die("sched_getaffinity");
	while (!CPU_ISSET(cpu, &all))
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof(one), &one))
		die("sched_setaffinity");
}

/*
 * oom_other CGROUP_PROCS_FILE KILL: one child of a group has most of its memory, and sleeps; the other one takes what is too
 * much for both. The first one is chosen. With KILL it is dying by then, of a signal that the other one had sent.
 *
 * Both are on one CPU, and the other one has the right of way: the kernel sends SIGKILL first and then names its victim, which
 * on a CPU of its own may have ended in between. With KILL it gets no time to end before.
 */
static int play_oom_other(int argc, char **argv)
{
	bool kills = argc > 1 && atoi(argv[1]);
	pid_t large, small;
	int ready[2], status;
	char more[128], byte;

	if (argc < 1 || pipe(ready))
		die("pipe");
	large = told_fork();
	if (large == 0) {
		int fd = open("/proc/self/oom_score_adj", O_WRONLY);

		if (fd < 0 || write(fd, "1000", 4) != 4)
			die("oom_score_adj");
		enter_group(argv[0]);
		stay_on_one();
		take_memory(22 << 20);
		if (write(ready[1], "", 1) != 1)
			die("write");
		for (;;)
			pause();
	}
	if (read(ready[0], &byte, 1) != 1)
		die("read");
	small = told_fork();
	if (small == 0) {
		enter_group(argv[0]);
		stay_on_one();
		if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 10}))
			die("sched_setscheduler");
		if (kills)
			kill(large, SIGKILL);
		take_memory(14 << 20);
		_exit(3);
	}
	if (waitpid(large, &status, 0) != large)
		die("waitpid");
	snprintf(more, sizeof(more), ",\"oom_killed\":%s,\"killed_by\":{\"pid\":%d,\"comm\":\"%s\",\"uid\":0}", kills ? "false" : "true",
		 kills ? small : 0, kills ? "truth" : "");
	tell_end(large, large, status, more);
	if (waitpid(small, &status, 0) != small)
		die("waitpid");
	tell_end(small, small, status, ",\"oom_killed\":false");
	return 0;
}

const struct scene signal_scenes[] = {
	{"signals", play_signals},
	{"killers", play_killers},
	{"caught", play_caught},
	{"oom", play_oom},
	{"oom_other", play_oom_other},
	{0},
};
