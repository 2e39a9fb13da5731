// SPDX-License-Identifier: Apache-2.0
// blame CASE [NUMBER]: deaths for which somebody else than who caused them may be blamed. Waits for a line on standard input, plays, and says of
// each death one JSON line: {"pid", "signal", "by": pid of who sent it (0: the kernel) or null if nobody can know, "or_nobody": may be unknown}.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void die(const char *what)
{
	perror(what);
	exit(90);
}

static void tell(pid_t pid, int status, pid_t by, const char *knowable)
{
	char who[16] = "null";

	if (by >= 0)
		snprintf(who, sizeof(who), "%d", by);
	dprintf(1, "{\"pid\":%d,\"signal\":%d,\"by\":%s,\"or_nobody\":%s}\n", pid, WIFSIGNALED(status) ? WTERMSIG(status) : 0, who, knowable);
}

static void bury(pid_t pid, pid_t by, bool or_nobody)
{
	int status;

	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	tell(pid, status, by, or_nobody ? "true" : "false");
}

static int said[2];

static void catch(int number)
{
	(void)number;
	if (write(said[1], "c", 1) != 1)
		_exit(96);
}

static void hear(void)
{
	char byte;

	if (read(said[0], &byte, 1) != 1)
		die("read");
}

static void say(void)
{
	if (write(said[1], "k", 1) != 1)
		_exit(97);
}

/* A child that does something, says so, and waits for signals. */
static pid_t victim(void (*prepare)(int), int number)
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork");
	if (pid == 0) {
		if (prepare)
			prepare(number);
		say();
		for (;;)
			pause();
	}
	hear();
	return pid;
}

/* Once: then it ends the process again. */
static void be_caught(int number)
{
	sigaction(number, &(struct sigaction){.sa_handler = catch, .sa_flags = SA_RESTART | SA_RESETHAND}, NULL);
}

/* Another process, of which nothing is left, sends it. */
static pid_t strike(pid_t target, int number)
{
	pid_t pid = fork();

	if (pid == 0) {
		prctl(PR_SET_NAME, "innocent");
		kill(target, number);
		_exit(0);
	}
	if (waitpid(pid, NULL, 0) != pid)
		die("waitpid");
	return pid;
}

static long forge(char how, pid_t pid, int number, int code, pid_t alleged)
{
	siginfo_t info;
	int fd;
	long result;

	memset(&info, 0, sizeof(info));
	info.si_signo = number;
	info.si_code = code;
	info.si_pid = alleged;
	if (how == 'q')
		return syscall(SYS_rt_sigqueueinfo, pid, number, &info);
	if (how == 't')
		return syscall(SYS_rt_tgsigqueueinfo, pid, pid, number, &info);
	fd = syscall(SYS_pidfd_open, pid, 0);
	if (fd < 0)
		die("pidfd_open");
	result = syscall(SYS_pidfd_send_signal, fd, number, &info, 0);
	close(fd);
	return result;
}

/* Of every way and code, to a signal that kills at once, one that dumps core, a fault's and a real-time one. */
static void case_forged(int unused)
{
	static const int numbers[] = {SIGTERM, SIGABRT, SIGSEGV, SIGALRM, SIGKILL, 40};

	(void)unused;
	for (const char *how = "qtp"; *how; how++)
		for (int code = -1; code >= -61; code--)
			for (int i = 0; i < (code < -8 ? 1 : 6); i++) {
				int number = numbers[(i - code) % 6];
				/* The kernel has these two: for a USB transfer, and for SIGIO. Whether it is the kernel cannot be known. */
				bool or_nobody = code == SI_ASYNCIO || code == SI_SIGIO;
				pid_t pid = victim(NULL, 0);

				if (forge(*how, pid, number, code, 1)) {
					if (errno != EPERM || code != SI_TKILL)
						die("forge");
					kill(pid, SIGKILL);
				}
				bury(pid, getpid(), or_nobody);
			}
}

/* To itself a process may send the kernel's codes. */
static void case_forged_to_itself(int unused)
{
	static const int numbers[] = {SIGTERM, SIGUSR1, SIGABRT, SIGALRM, 40};

	(void)unused;
	for (int i = 0; i < 5; i++)
		for (int code = -2; code <= 0x80; code = code < 6 ? code + 1 : code + 0x7a) {
			pid_t pid = fork();

			if (pid == 0) {
				forge("qt"[i % 2], getpid(), numbers[i], code, 1);
				_exit(0);
			}
			bury(pid, pid, true);
		}
}

static void attach(pid_t pid)
{
	int status;

	if (ptrace(PTRACE_SEIZE, pid, NULL, NULL) || ptrace(PTRACE_INTERRUPT, pid, NULL, NULL))
		die("ptrace");
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		die("no stop");
}

/* Into the stop before a signal is delivered, where a debugger may put another one, or whatever siginfo it likes. */
static void stop_before_a_signal(pid_t pid)
{
	int status;

	attach(pid);
	if (ptrace(PTRACE_CONT, pid, NULL, NULL))
		die("PTRACE_CONT");
	kill(pid, SIGURG);
	if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
		die("no stop");
}

static void inject(pid_t pid, int number, pid_t alleged)
{
	siginfo_t info;

	memset(&info, 0, sizeof(info));
	info.si_signo = number;
	info.si_pid = alleged;
	stop_before_a_signal(pid);
	if ((alleged && ptrace(PTRACE_SETSIGINFO, pid, NULL, &info)) || ptrace(PTRACE_CONT, pid, NULL, number))
		die("PTRACE_CONT");
}

/* A debugger's own: every signal that it stops for it lets through. */
static void bury_traced(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) == pid && WIFSTOPPED(status))
		if (ptrace(PTRACE_CONT, pid, NULL, WSTOPSIG(status)))
			die("PTRACE_CONT");
	tell(pid, status, -1, "true");
}

/* A debugger ends a process by a signal that somebody had sent it before, which it survived; and says that it is that one's. */
static void case_injected(int number)
{
	for (int forged = 0; forged < 2; forged++) {
		pid_t pid = victim(be_caught, number), innocent = strike(pid, number);

		hear();
		inject(pid, number, forged ? innocent : 0);
		bury_traced(pid);
	}
}

static void take_by_signalfd(int number)
{
	struct signalfd_siginfo info;
	sigset_t set;
	int fd;

	sigemptyset(&set);
	sigaddset(&set, number);
	sigprocmask(SIG_BLOCK, &set, NULL);
	fd = signalfd(-1, &set, SFD_CLOEXEC);
	say();
	if (fd < 0 || read(fd, &info, sizeof(info)) != sizeof(info))
		_exit(95);
	sigprocmask(SIG_UNBLOCK, &set, NULL);
}

/* What was sent was taken by a signalfd; then a debugger puts the same signal there. */
static void case_injected_after_signalfd(int number)
{
	pid_t pid = victim(take_by_signalfd, number);

	strike(pid, number);
	hear();
	inject(pid, number, 0);
	bury_traced(pid);
}

/* A debugger that looks on, and lets a signal through. */
static void case_traced(int number)
{
	pid_t pid = victim(NULL, 0), by;
	int status;

	attach(pid);
	if (ptrace(PTRACE_CONT, pid, NULL, NULL))
		die("PTRACE_CONT");
	by = strike(pid, number);
	if (number != SIGKILL) {
		if (waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status))
			die("no stop");
		if (ptrace(PTRACE_CONT, pid, NULL, number))
			die("PTRACE_CONT");
	}
	bury(pid, by, false);
}

static void forbid_getppid(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {.len = 4, .filter = filter};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
		_exit(94);
}

static int go[2];

static void break_a_rule_when_told(int number)
{
	char byte;

	be_caught(number);
	say();
	if (read(go[0], &byte, 1) != 1)
		_exit(93);
	forbid_getppid();
	syscall(__NR_getppid);
	_exit(92);
}

/* It survives SIGSYS that somebody sends, and then seccomp ends it by one. Kernels before 5.16 do so without a signal that is sent. */
static void case_seccomp(int unused)
{
	pid_t pid;

	(void)unused;
	if (pipe(go))
		die("pipe");
	pid = fork();
	if (pid == 0)
		break_a_rule_when_told(SIGSYS);
	hear();
	strike(pid, SIGSYS);
	hear();
	if (write(go[1], "", 1) != 1)
		die("write");
	bury(pid, 0, true);
}

static void block(int number)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, number);
	sigprocmask(SIG_BLOCK, &set, NULL);
}

static volatile sig_atomic_t caught;

static void count(int number)
{
	(void)number;
	caught++;
}

static void unblock_when_told(int number)
{
	sigset_t set;
	char byte;

	block(number);
	say();
	if (read(go[0], &byte, 1) != 1)
		_exit(93);
	sigemptyset(&set);
	sigprocmask(SIG_SETMASK, &set, NULL);
	_exit(91);
}

/* While one waits that will kill, another user's processes catch more than any table has room for. */
static void case_many_caught(int many)
{
	pid_t pid, by;

	if (pipe(go))
		die("pipe");
	pid = fork();
	if (pid == 0)
		unblock_when_told(SIGTERM);
	hear();
	by = strike(pid, SIGTERM);
	for (int children = 0; children < many / 62; children++) {
		pid_t child = fork();

		if (child == 0) {
			for (int number = 1; number < 65; number++)
				signal(number, count);
			for (int number = 1; number < 65; number++)
				if (number != SIGKILL && number != SIGSTOP)
					kill(getpid(), number);
			_exit(caught >= 60 ? 0 : 1);
		}
		if (waitpid(child, NULL, 0) != child)
			die("waitpid");
	}
	if (write(go[1], "", 1) != 1)
		die("write");
	bury(pid, by, false);
}

/* A debugger puts a signal there that is blocked: it waits until it is not. */
static void case_injected_and_blocked(int number)
{
	pid_t pid;
	int status;

	if (pipe(go))
		die("pipe");
	pid = fork();
	if (pid == 0)
		unblock_when_told(number);
	hear();
	inject(pid, number, 0);
	/* Back at its system call: the signal was put off. */
	if (ptrace(PTRACE_INTERRUPT, pid, NULL, NULL) || waitpid(pid, &status, 0) != pid || !WIFSTOPPED(status) ||
	    ptrace(PTRACE_CONT, pid, NULL, NULL) || write(go[1], "", 1) != 1)
		die("put off");
	bury_traced(pid);
}

static void *leave(void *barrier)
{
	pthread_barrier_wait(barrier);
	syscall(SYS_exit, 0);
	return NULL;
}

/* So many children with two threads that end together, and are not waited for until all have ended. */
static void case_two_threads(int many)
{
	pid_t *pids = calloc(many, sizeof(*pids));

	for (int i = 0; i < many; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			die("fork");
		if (pids[i] == 0) {
			pthread_barrier_t barrier;
			pthread_t thread;

			pthread_barrier_init(&barrier, NULL, 2);
			if (pthread_create(&thread, NULL, leave, &barrier))
				die("pthread_create");
			leave(&barrier);
		}
	}
	for (int i = 0; i < many; i++)
		if (waitid(P_PID, pids[i], &(siginfo_t){0}, WEXITED | WNOWAIT))
			die("waitid");
	dprintf(1, "{\"zombies\":%d}\n", many);
	if (getchar() == EOF)
		exit(1);
	while (wait(NULL) > 0)
		;
}

static const char *argument;

static int sleep_for_good(void *unused)
{
	(void)unused;
	for (;;)
		pause();
	return 0;
}

/* Memory runs out in a control group, for a process whose memory another one has too: both are killed. */
static void case_shared_memory(int unused)
{
	static char stack[64 << 10];
	pid_t sharer, victim_of_it = fork();

	(void)unused;
	if (victim_of_it == 0) {
		int fd = open(argument, O_WRONLY);
		cpu_set_t one;

		CPU_ZERO(&one);
		CPU_SET(sched_getcpu(), &one);
		if (sched_setaffinity(0, sizeof(one), &one))
			die("sched_setaffinity");
		if (fd < 0 || write(fd, "0", 1) != 1)
			die(argument);
		sharer = clone(sleep_for_good, stack + sizeof(stack), CLONE_VM | CLONE_PARENT | SIGCHLD, NULL);
		if (sharer < 0 || write(said[1], &sharer, sizeof(sharer)) != sizeof(sharer))
			die("clone");
		/* The other one has to wait: the kernel sends SIGKILL first and then says what for. */
		if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 10}))
			die("sched_setscheduler");
		for (;;) {
			char *more = malloc(1 << 20);

			if (more)
				memset(more, 1, 1 << 20);
		}
	}
	if (read(said[0], &sharer, sizeof(sharer)) != sizeof(sharer))
		die("read");
	bury(victim_of_it, 0, false);
	bury(sharer, 0, false);
}

/* io_uring's thread that polls: the kernel makes it within the process. */
static void case_kernels_thread(int unused)
{
	unsigned int parameters[30] = {[2] = 1U << 1}; /* struct io_uring_params: IORING_SETUP_SQPOLL */
	int fd = syscall(SYS_io_uring_setup, 4, parameters);

	(void)unused;
	dprintf(1, "{\"threads\":%d}\n", fd >= 0);
	close(fd);
}

static const struct {
	const char *name;
	void (*play)(int);
} cases[] = {
	{"forged", case_forged},
	{"forged_to_itself", case_forged_to_itself},
	{"injected", case_injected},
	{"injected_after_signalfd", case_injected_after_signalfd},
	{"injected_and_blocked", case_injected_and_blocked},
	{"traced", case_traced},
	{"seccomp", case_seccomp},
	{"many_caught", case_many_caught},
	{"two_threads", case_two_threads},
	{"shared_memory", case_shared_memory},
	{"kernels_thread", case_kernels_thread},
};

int main(int argc, char **argv)
{
	if (argc < 2 || pipe(said))
		return 90;
	setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
	if (getchar() == EOF)
		return 1;
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		if (!strcmp(cases[i].name, argv[1])) {
			argument = argc > 2 ? argv[2] : NULL;
			cases[i].play(argc > 2 ? atoi(argv[2]) : 0);
			return 0;
		}
	return 91;
}
