// SPDX-License-Identifier: Apache-2.0
// pace SEED RATE COUNT MIX FILE: one deed after the other, drawn by SEED from the letters of MIX, at most RATE a second (0: as fast as it
// goes), COUNT of them (0: until it is told to stop). The deeds:
//   f  a child that ends with a code     e  one that execs first     k  one that a signal ends     t  a thread
// Prints {"ready":PID}, waits for a line on standard input, and stops early at the next line there, at its end, or at SIGTERM. However it
// stops, it prints what it did, one line: {"deeds":N,"seconds":S,"f":N,"e":N,"k":N,"t":N}. FILE then has 32-bit integers deed, id, status
// (as waitpid has it) for each.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct deed {
	int32_t kind, id, status;
};

static volatile sig_atomic_t stopped;

static void die(const char *what)
{
	fprintf(stderr, "pace: %s: %s\n", what, strerror(errno));
	_exit(99);
}

static void on_signal(int number)
{
	(void)number;
	stopped = 1;
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* xorshift64*: the same deeds for the same seed, whatever the C library. */
static uint32_t draw(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return (uint32_t)(*state * 0x2545F4914F6CDD1Dull >> 32);
}

/* Until `due`, or until there is word to stop; once for all if that time has come already. */
static void wait_until(double due)
{
	double left;

	do {
		struct pollfd input = {.fd = 0, .events = POLLIN};
		struct timespec time = {0};
		int ready;

		left = due - now();
		if (left > 0) {
			time.tv_sec = (time_t)left;
			time.tv_nsec = (long)((left - (double)time.tv_sec) * 1e9);
		}
		ready = ppoll(&input, 1, &time, NULL);
		if (ready > 0)
			stopped = 1;
		else if (ready < 0 && errno != EINTR)
			die("ppoll");
	} while (left > 0 && !stopped);
}

static int thread(void *nothing)
{
	(void)nothing;
	return 0;
}

/* clone(2) and not pthread_create: an end is in the kernel then, and its id known, when this returns. */
static void run_thread(struct deed *deed)
{
	static char stack[16384] __attribute__((aligned(16)));
	static volatile int32_t alive; /* the kernel clears it, and wakes (CLONE_CHILD_CLEARTID) */
	const int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;

	alive = 1;
	if (clone(thread, stack + sizeof(stack), flags, NULL, &deed->id, NULL, &alive) < 0)
		die("clone");
	while (alive)
		syscall(SYS_futex, &alive, FUTEX_WAIT, 1, NULL);
}

static void run_child(struct deed *deed, int code)
{
	/* vfork where there is an exec: that is what fast spawners do. */
	pid_t child = deed->kind == 'e' ? vfork() : fork();

	if (child < 0)
		die("fork");
	if (child == 0) {
		char text[8] = {(char)('0' + code / 100), (char)('0' + code / 10 % 10), (char)('0' + code % 10)};

		if (deed->kind == 'e')
			execl("/proc/self/exe", "pace", "end", text, NULL);
		if (deed->kind == 'k') {
			signal(SIGTERM, SIG_DFL);
			kill(getpid(), code % 2 ? SIGKILL : SIGTERM);
		}
		_exit(code);
	}
	deed->id = child;
	while (waitpid(child, &deed->status, 0) != child)
		if (errno != EINTR)
			die("waitpid");
}

static void save(const char *name, const struct deed *deeds, size_t count)
{
	const char *at = (const char *)deeds;
	size_t left = count * sizeof(*deeds);
	int fd = open(name, O_CREAT | O_WRONLY | O_EXCL, 0600);

	if (fd < 0)
		die(name);
	while (left) {
		ssize_t written = write(fd, at, left);

		if (written < 0 && errno != EINTR)
			die(name);
		if (written > 0) {
			at += written;
			left -= (size_t)written;
		}
	}
	if (close(fd))
		die(name);
}

int main(int argc, char **argv)
{
	size_t count = 0, room = 1 << 12, most, kinds;
	int of_kind[128] = {0};
	struct deed *deeds;
	double rate, began;
	uint64_t state;
	char word[16];

	if (argc == 3 && !strcmp(argv[1], "end"))
		_exit(atoi(argv[2]));
	if (argc != 6 || !*argv[4] || argv[4][strspn(argv[4], "fekt")]) {
		fprintf(stderr, "usage: pace SEED RATE COUNT MIX FILE\n");
		return 2;
	}
	state = strtoull(argv[1], NULL, 10) * 0x9E3779B97F4A7C15ull | 1;
	rate = atof(argv[2]);
	most = strtoul(argv[3], NULL, 10);
	kinds = strlen(argv[4]);
	deeds = malloc(room * sizeof(*deeds));
	if (!deeds)
		die("malloc");
	if (sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL))
		die("sigaction");
	setvbuf(stdin, NULL, _IONBF, 0); /* a second line must stay where poll(2) sees it */
	printf("{\"ready\":%d}\n", getpid());
	fflush(stdout);
	if (!fgets(word, sizeof(word), stdin))
		return 97;
	began = now();
	while (!most || count < most) {
		struct deed *deed;

		wait_until(rate > 0 ? began + (double)count / rate : 0);
		if (stopped)
			break;
		if (count == room) {
			room *= 2;
			deeds = realloc(deeds, room * sizeof(*deeds));
			if (!deeds)
				die("realloc");
		}
		deed = &deeds[count++];
		*deed = (struct deed){.kind = argv[4][draw(&state) % kinds]};
		if (deed->kind == 't')
			run_thread(deed);
		else
			run_child(deed, (int)(draw(&state) & 0xff));
		of_kind[deed->kind]++;
	}
	save(argv[5], deeds, count);
	printf("{\"deeds\":%zu,\"seconds\":%.3f,\"f\":%d,\"e\":%d,\"k\":%d,\"t\":%d}\n", count, now() - began, of_kind['f'], of_kind['e'],
	       of_kind['k'], of_kind['t']);
	return 0;
}
