// SPDX-License-Identifier: Apache-2.0
// storm KIND COUNT WORKERS FOLDER [RATE]: COUNT ends of children (KIND fork, exec) or of threads (KIND threads), shared among
// WORKERS processes, as fast as they go, or so many in a second, with the right of way that this takes. Prints {"ready":PID}, waits for a line on standard input, and at the end prints
// one line of totals. Each worker leaves FOLDER/WORKER_PID: 32-bit integers id, status (as waitpid has it) for each end.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct end {
	int32_t id, status;
};

static void die(const char *what)
{
	fprintf(stderr, "storm: %s: %s\n", what, strerror(errno));
	_exit(99);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* Not faster than `rate`; what was missed is caught up on. */
static void keep_pace(int done, double rate, double began)
{
	double ahead = began + done / rate - now();

	if (ahead > 0)
		nanosleep(&(struct timespec){.tv_nsec = (long)(ahead * 1e9)}, NULL);
}

static int thread(void *nothing)
{
	(void)nothing;
	return 0;
}

/* clone(2) and not pthread_create, which spends more time on stacks and signal masks than the kernel on threads. */
static void run_threads(struct end *ends, int count, double rate)
{
	static char stack[16384] __attribute__((aligned(16)));
	static volatile int32_t alive; /* the kernel clears it, and wakes, when the thread has ended (CLONE_CHILD_CLEARTID) */
	const int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;

	double began = now();

	for (int i = 0; i < count; i++) {
		if (rate > 0 && i % 64 == 0)
			keep_pace(i, rate, began);
		alive = 1;
		if (clone(thread, stack + sizeof(stack), flags, NULL, &ends[i].id, NULL, &alive) < 0)
			die("clone");
		while (alive)
			syscall(SYS_futex, &alive, FUTEX_WAIT, 1, NULL);
	}
}

/* Each worker on a CPU of its own: else they spend their time on waking each other's. */
static void stay_on(int number)
{
	cpu_set_t all, one;
	int cpu = 0;

	if (sched_getaffinity(0, sizeof(all), &all))
		die("sched_getaffinity");
	number %= CPU_COUNT(&all);
	while (!CPU_ISSET(cpu, &all) || number--)
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof(one), &one))
		die("sched_setaffinity");
}

static void run_processes(struct end *ends, int count, int with_exec)
{
	for (int i = 0; i < count; i++) {
		int code = i * 7 & 0xff, status;
		/* vfork where there is an exec: that is what fast spawners do. */
		pid_t child = with_exec ? vfork() : fork();

		if (child < 0)
			die("fork");
		if (child == 0) {
			char text[8] = {(char)('0' + code / 100), (char)('0' + code / 10 % 10), (char)('0' + code % 10)};

			if (with_exec)
				execl("/proc/self/exe", "storm", "end", text, NULL);
			_exit(code);
		}
		if (waitpid(child, &status, 0) != child)
			die("waitpid");
		ends[i] = (struct end){child, status};
	}
}

int main(int argc, char **argv)
{
	double began, rate;
	int count, workers, status;
	char word[16];

	if (argc == 3 && !strcmp(argv[1], "end"))
		_exit(atoi(argv[2]));
	if (argc < 5 || argc > 6 || (workers = atoi(argv[3])) < 1) {
		fprintf(stderr, "usage: storm fork|exec|threads COUNT WORKERS FOLDER [RATE]\n");
		return 2;
	}
	count = atoi(argv[2]) / workers;
	rate = argc == 6 ? atof(argv[5]) : 0;
	if (rate > 0 && setpriority(PRIO_PROCESS, 0, -10))
		die("setpriority");
	printf("{\"ready\":%d}\n", getpid());
	fflush(stdout);
	if (!fgets(word, sizeof(word), stdin))
		return 97;
	began = now();
	for (int i = 0; i < workers; i++) {
		pid_t worker = fork();

		if (worker < 0)
			die("fork");
		if (worker == 0) {
			struct end *ends = calloc((size_t)count, sizeof(*ends));
			ssize_t size = (ssize_t)((size_t)count * sizeof(*ends));
			char name[4096];
			int fd;

			if (!ends)
				die("calloc");
			stay_on(i);
			if (*argv[1] == 't')
				run_threads(ends, count, rate / workers);
			else
				run_processes(ends, count, *argv[1] == 'e');
			snprintf(name, sizeof(name), "%s/%d", argv[4], getpid());
			fd = open(name, O_CREAT | O_WRONLY | O_EXCL, 0600);
			if (fd < 0 || write(fd, ends, (size_t)size) != size || close(fd))
				die(name);
			_exit(0);
		}
	}
	for (int i = 0; i < workers; i++)
		if (wait(&status) < 0 || status)
			return 98;
	printf("{\"count\":%d,\"workers\":%d,\"seconds\":%.3f}\n", count * workers, workers, now() - began);
	return 0;
}
