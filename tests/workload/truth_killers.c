// SPDX-License-Identifier: Apache-2.0
// killed CASE [ARGUMENT]...: who ended a process, where more than one may be thought to have. The truth is the signal that
// waitpid reports, and who sent that one.
#define _GNU_SOURCE
#include "truth.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { NOBODY = 65534 };

struct author {
	pid_t pid;
	char comm[16];
	uid_t uid;
};

static const struct author kernel;

static void reap_by(pid_t child, const struct author *by)
{
	char more[160];
	int status;

	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	snprintf(more, sizeof(more), ",\"killed_by\":{\"pid\":%d,\"comm\":\"%s\",\"uid\":%d}", by->pid, by->comm, by->uid);
	tell_end(child, OPEN_TID, status, more);
}

static struct author root(void)
{
	return (struct author){.pid = host_pid(), .comm = "truth", .uid = getuid()};
}

/* A child that does what it is told, two bytes an order, and says when it has, and when it has caught a signal. */
static struct {
	pid_t pid;
	int orders, answers;
} victim;

static int said;

static void catch(int number)
{
	(void)number;
	if (write(said, "c", 1) != 1)
		_exit(96);
}

static void *raise_by_thread(struct worker *worker)
{
	tell_thread_end(host_pid(), worker->tid, worker->value);
	syscall(SYS_tgkill, getpid(), getpid(), worker->value);
	return sleep_for_good(worker);
}

static void obey(char order, int number)
{
	static struct worker worker;
	struct sigaction action = {.sa_handler = catch, .sa_flags = SA_RESTART};
	struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = number};
	sigset_t set;
	timer_t timer;

	sigemptyset(&set);
	sigaddset(&set, number);
	switch (order) {
	case 'h': /* handle it */
		sigaction(number, &action, NULL);
		break;
	case 'i':
		signal(number, SIG_IGN);
		break;
	case 'd':
		signal(number, SIG_DFL);
		break;
	case 'b':
		sigprocmask(SIG_BLOCK, &set, NULL);
		break;
	case 'u': /* unblock all at once */
		sigemptyset(&set);
		sigprocmask(SIG_SETMASK, &set, NULL);
		break;
	case 'x':
		_exit(number);
	case 'r':
		kill(getpid(), number);
		break;
	case 'f':
		fall(number);
		break;
	case 'g': /* a process group of its own */
		setpgid(0, 0);
		break;
	case 'n':
		if (setresuid(NOBODY, NOBODY, NOBODY))
			die("setresuid");
		break;
	case 't':
		worker.value = number;
		start_worker(&worker, raise_by_thread);
		break;
	case 'a': /* soon */
		setitimer(ITIMER_REAL, &(struct itimerval){.it_value.tv_usec = 5000}, NULL);
		break;
	case 'p':
		timer_create(CLOCK_MONOTONIC, &event, &timer);
		timer_settime(timer, 0, &(struct itimerspec){.it_value.tv_nsec = 5000000}, NULL);
		break;
	case 'l':
		setrlimit(RLIMIT_CPU, &(struct rlimit){1, 5});
		for (;;)
			;
	case 's':
		setsid();
		break;
	default:
		_exit(95);
	}
}

static void start_victim(void)
{
	int orders[2], answers[2];

	if (pipe2(orders, O_CLOEXEC) || pipe2(answers, O_CLOEXEC))
		die("pipe2");
	victim.pid = told_fork();
	if (victim.pid == 0) {
		char order[2];

		close(orders[1]);
		close(answers[0]);
		said = answers[1];
		setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
		while (read(orders[0], order, 2) == 2) {
			obey(order[0], order[1]);
			if (write(said, "k", 1) != 1)
				_exit(94);
		}
		_exit(93);
	}
	close(orders[0]);
	close(answers[1]);
	victim.orders = orders[1];
	victim.answers = answers[0];
}

static void expect(char what)
{
	char answer = 0;

	if (read(victim.answers, &answer, 1) != 1 || answer != what)
		die("the victim's answer");
}

/* The last order that it obeys. */
static void send_last(char order, int number)
{
	char bytes[2] = {order, (char)number};

	if (write(victim.orders, bytes, 2) != 2)
		die("order");
}

static void send(char order, int number)
{
	send_last(order, number);
	expect('k');
}

static void bury(const struct author *by)
{
	reap_by(victim.pid, by);
	close(victim.orders);
	close(victim.answers);
}

/* Another process, of which nothing is left, sends the victim a signal. */
static struct author strike(const char *name, int number)
{
	struct author author = {.uid = getuid()};

	strcpy(author.comm, name);
	author.pid = told_fork();
	if (author.pid == 0) {
		prctl(PR_SET_NAME, name);
		kill(victim.pid, number);
		_exit(0);
	}
	reap(author.pid);
	return author;
}

static void handled(int number)
{
	start_victim();
	send('h', number);
	strike("sender A", number);
	expect('c');
}

static void case_handled_then_killed(void)
{
	struct author by;

	handled(SIGTERM);
	by = strike("sender B", SIGKILL);
	bury(&by);
}

static void case_handled_then_exit(void)
{
	handled(SIGTERM);
	send_last('x', 0);
	reap(victim.pid);
	handled(SIGTERM);
	send_last('x', SIGTERM); /* a code that looks like the signal */
	reap(victim.pid);
}

static void case_handled_then_raised(void)
{
	handled(SIGTERM);
	send('d', SIGTERM);
	send_last('r', SIGTERM);
	bury(&(struct author){.pid = victim.pid, .comm = "truth"});
}

static void case_handled_then_sent_again(void)
{
	struct author by;

	handled(SIGTERM);
	send('d', SIGTERM);
	by = strike("sender B", SIGTERM);
	bury(&by);
}

static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
#define FAULTS (sizeof(faults) / sizeof(faults[0]))

static void case_handled_then_fault(void)
{
	for (size_t i = 0; i < FAULTS; i++) {
		handled(faults[i]);
		send('d', faults[i]);
		send_last('f', faults[i]);
		bury(&kernel);
	}
}

static void case_faults(void)
{
	for (size_t i = 0; i < FAULTS; i++) {
		start_victim();
		send_last('f', faults[i]);
		bury(&kernel);
	}
}

static void case_faults_that_were_sent(void)
{
	for (size_t i = 0; i < FAULTS; i++) {
		struct author by;

		start_victim();
		send('h', SIGUSR1);
		by = strike("sender A", faults[i]);
		bury(&by);
	}
}

static void case_blocked_then_killed(void)
{
	struct author by;

	start_victim();
	send('b', SIGTERM);
	strike("sender A", SIGTERM);
	by = strike("sender B", SIGKILL);
	bury(&by);
}

/* Two that wait: signal(7) leaves the order open, Linux takes the lower number first. */
static void case_two_blocked(void)
{
	struct author by[2];
	char more[160];
	int status;

	start_victim();
	send('b', SIGTERM);
	send('b', SIGUSR1);
	by[0] = strike("sender A", SIGUSR1);
	by[1] = strike("sender B", SIGTERM);
	send_last('u', 0);
	if (waitpid(victim.pid, &status, 0) != victim.pid)
		die("waitpid");
	snprintf(more, sizeof(more), ",\"killed_by\":{\"pid\":%d,\"comm\":\"%s\",\"uid\":0}", by[WTERMSIG(status) == SIGTERM].pid,
		 by[WTERMSIG(status) == SIGTERM].comm);
	tell_end(victim.pid, victim.pid, status, more);
}

/* One that waits already is not sent again (signal(7)): the first sender's is the one. */
static void case_blocked_twice(void)
{
	struct author by;

	start_victim();
	send('b', SIGTERM);
	by = strike("sender A", SIGTERM);
	strike("sender B", SIGTERM);
	send_last('u', 0);
	bury(&by);
}

static void case_ignored_then_exit(void)
{
	start_victim();
	send('i', SIGTERM);
	strike("sender A", SIGTERM);
	send_last('x', 7);
	reap(victim.pid);
}

static void case_ignored_then_sent_again(void)
{
	struct author by;

	start_victim();
	send('i', SIGTERM);
	strike("sender A", SIGTERM);
	send('d', SIGTERM);
	by = strike("sender B", SIGTERM);
	bury(&by);
}

static void run_first(void)
{
	if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 10}))
		die("sched_setscheduler");
}

/*
 * A sends `first`, then B sends `second`, and the victim does not run in between: all three are kept on one CPU, and A and B
 * have the right of way there.
 */
static void double_strike(int first, int second)
{
	int to_a[2], to_b[2], ready[2], status;
	struct author a, b, *by;
	char byte, more[160];
	cpu_set_t all, one;
	int cpu = 0;

	if (sched_getaffinity(0, sizeof(all), &all) || pipe(to_a) || pipe(to_b) || pipe(ready))
		die("pipe");
	while (!CPU_ISSET(cpu, &all))
		cpu++;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	start_victim();
	send('h', SIGUSR2); /* it waits for orders now */
	if (sched_setaffinity(victim.pid, sizeof(one), &one))
		die("sched_setaffinity");
	b = a = root();
	b.pid = told_fork();
	if (b.pid == 0) {
		sched_setaffinity(0, sizeof(one), &one);
		run_first();
		/* Nobody else runs here between this and the read. */
		if (write(ready[1], "", 1) == 1 && read(to_b[0], &byte, 1) == 1)
			kill(victim.pid, second);
		_exit(0);
	}
	a.pid = told_fork();
	if (a.pid == 0) {
		sched_setaffinity(0, sizeof(one), &one);
		run_first();
		if (write(ready[1], "", 1) == 1 && read(to_a[0], &byte, 1) == 1) {
			kill(victim.pid, first);
			if (write(to_b[1], "", 1) != 1)
				_exit(92);
		}
		_exit(0);
	}
	for (int i = 0; i < 2; i++)
		if (read(ready[0], &byte, 1) != 1)
			die("read");
	if (write(to_a[1], "", 1) != 1)
		die("write");
	for (int i = 0; i < 2; i++) {
		close(to_a[i]);
		close(to_b[i]);
		close(ready[i]);
	}
	reap(a.pid);
	reap(b.pid);
	if (waitpid(victim.pid, &status, 0) != victim.pid)
		die("waitpid");
	by = WTERMSIG(status) == first ? &a : &b;
	snprintf(more, sizeof(more), ",\"killed_by\":{\"pid\":%d,\"comm\":\"truth\",\"uid\":0}", by->pid);
	tell_end(victim.pid, victim.pid, status, more);
}

static void case_kill_then_term(void)
{
	for (int i = 0; i < 20; i++)
		double_strike(SIGKILL, SIGTERM);
}

static void case_term_then_kill(void)
{
	for (int i = 0; i < 20; i++)
		double_strike(SIGTERM, SIGKILL);
}

static void case_quit_then_kill(void) /* a signal that dumps core is not final when it is sent */
{
	for (int i = 0; i < 20; i++)
		double_strike(SIGQUIT, SIGKILL);
}

static void case_kill_twice(void)
{
	for (int i = 0; i < 20; i++)
		double_strike(SIGKILL, SIGKILL);
}

static void case_group(void)
{
	struct author by = root();

	start_victim();
	send('g', 0);
	kill(-victim.pid, SIGTERM);
	bury(&by);
}

static void case_other_user(void)
{
	struct author by = {.comm = "truth", .uid = NOBODY};

	start_victim();
	send('n', 0);
	by.pid = told_fork();
	if (by.pid == 0) {
		if (setresuid(NOBODY, NOBODY, NOBODY))
			die("setresuid");
		kill(victim.pid, SIGTERM);
		_exit(0);
	}
	reap(by.pid);
	bury(&by);
}

static void case_own_thread(void)
{
	start_victim();
	send_last('t', SIGTERM);
	bury(&(struct author){.pid = victim.pid, .comm = "truth"});
}

static void *strike_by_thread(struct worker *worker)
{
	prctl(PR_SET_NAME, "a thread");
	kill(worker->value, SIGTERM);
	return NULL;
}

/* Who sent it is the process, by the name of the process. */
static void case_by_thread(void)
{
	static struct worker worker;
	struct author by = root();

	start_victim();
	worker.value = victim.pid;
	start_worker(&worker, strike_by_thread);
	join_worker(&worker, 0);
	bury(&by);
}

/*
 * A timer goes off in an interrupt, and so in the middle of whoever runs there: which is the root, that has nothing to do with
 * it. (It only waits, as fast as it can.)
 */
static void bury_while_busy(void)
{
	char more[] = ",\"killed_by\":{\"pid\":0,\"comm\":\"\",\"uid\":0}";
	int status;

	while (waitpid(victim.pid, &status, WNOHANG) != victim.pid)
		;
	tell_end(victim.pid, victim.pid, status, more);
}

static void timers(char order, int number)
{
	cpu_set_t all;

	if (sched_getaffinity(0, sizeof(all), &all))
		die("sched_getaffinity");
	stay_on_one();
	for (int i = 0; i < 10; i++) {
		start_victim();
		send_last(order, number);
		bury_while_busy();
	}
	sched_setaffinity(0, sizeof(all), &all);
}

static void case_alarm(void)
{
	timers('a', SIGALRM);
}

static void case_timer(void)
{
	timers('p', SIGUSR1);
}

static void case_cpu_limit(void)
{
	start_victim();
	send_last('l', 0);
	bury(&kernel);
}

/* The kernel sends SIGPIPE and SIGXFSZ itself, though in the name of the process that wrote. */
static void case_own_writes(void)
{
	static const int numbers[] = {SIGPIPE, SIGXFSZ};

	for (int i = 0; i < 2; i++) {
		start_victim();
		send_last('f', numbers[i]);
		bury(&kernel);
	}
}

/* It comes from the parent that ends. */
static void case_parent_death(void)
{
	struct author by, me = root();
	int inner[2], outer[2];
	pid_t child;
	char byte;

	prctl(PR_SET_CHILD_SUBREAPER, 1);
	if (pipe(inner) || pipe(outer))
		die("pipe");
	by = me;
	by.pid = told_fork();
	if (by.pid == 0) {
		prctl(PR_SET_NAME, "a parent");
		child = told_fork();
		if (child == 0) {
			prctl(PR_SET_NAME, "truth");
			prctl(PR_SET_PDEATHSIG, SIGUSR2);
			if (write(inner[1], "", 1) != 1)
				die("write");
			for (;;)
				pause();
		}
		/* It has told of the fork, and the child is ready. */
		if (read(inner[0], &byte, 1) != 1 || write(outer[1], &child, sizeof(child)) != sizeof(child))
			die("a parent");
		for (;;)
			pause();
	}
	if (read(outer[0], &child, sizeof(child)) != sizeof(child))
		die("read");
	strcpy(by.comm, "a parent");
	kill(by.pid, SIGTERM);
	reap_by(by.pid, &me);
	reap_by(child, &by);
	for (int i = 0; i < 2; i++) {
		close(inner[i]);
		close(outer[i]);
	}
}

static int open_terminal(void)
{
	int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);

	if (master < 0 || grantpt(master) || unlockpt(master))
		die("posix_openpt");
	return master;
}

static pid_t start_on(int master)
{
	char name[64], byte;
	pid_t child;
	int gate[2];

	if (ptsname_r(master, name, sizeof(name)) || pipe(gate))
		die("ptsname_r");
	child = told_fork();
	if (child == 0) {
		close(master);
		setsid();
		if (open(name, O_RDWR) < 0) /* a session leader's first terminal becomes the controlling one */
			die(name);
		if (write(gate[1], "", 1) != 1)
			die("write");
		for (;;)
			pause();
	}
	if (read(gate[0], &byte, 1) != 1)
		die("read");
	close(gate[0]);
	close(gate[1]);
	return child;
}

static void case_terminal(void)
{
	int master = open_terminal();
	pid_t child = start_on(master);

	close(master); /* hang up */
	reap_by(child, &kernel);
	master = open_terminal();
	child = start_on(master);
	if (write(master, "\003", 1) != 1) /* ^C */
		die("write");
	reap_by(child, &kernel);
	close(master);
}

static const char *argument;

/* By cgroup.kill of the group's folder: from whoever wrote there. */
static void case_group_kill(void)
{
	struct author by = root();
	char name[512], text[16];
	int fd;

	start_victim();
	send('h', SIGUSR1);
	snprintf(name, sizeof(name), "%s/cgroup.procs", argument);
	snprintf(text, sizeof(text), "%d", victim.pid);
	fd = open(name, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0 || close(fd))
		die(name);
	snprintf(name, sizeof(name), "%s/cgroup.kill", argument);
	fd = open(name, O_WRONLY);
	if (fd < 0 || write(fd, "1", 1) != 1 || close(fd))
		die(name);
	bury(&by);
}

static const struct {
	const char *name;
	void (*play)(void);
} cases[] = {
	{"handled_then_killed", case_handled_then_killed},
	{"handled_then_exit", case_handled_then_exit},
	{"handled_then_raised", case_handled_then_raised},
	{"handled_then_sent_again", case_handled_then_sent_again},
	{"handled_then_fault", case_handled_then_fault},
	{"faults", case_faults},
	{"faults_that_were_sent", case_faults_that_were_sent},
	{"blocked_then_killed", case_blocked_then_killed},
	{"two_blocked", case_two_blocked},
	{"blocked_twice", case_blocked_twice},
	{"ignored_then_exit", case_ignored_then_exit},
	{"ignored_then_sent_again", case_ignored_then_sent_again},
	{"kill_then_term", case_kill_then_term},
	{"term_then_kill", case_term_then_kill},
	{"quit_then_kill", case_quit_then_kill},
	{"kill_twice", case_kill_twice},
	{"group", case_group},
	{"other_user", case_other_user},
	{"own_thread", case_own_thread},
	{"by_thread", case_by_thread},
	{"alarm", case_alarm},
	{"timer", case_timer},
	{"cpu_limit", case_cpu_limit},
	{"own_writes", case_own_writes},
	{"parent_death", case_parent_death},
	{"terminal", case_terminal},
	{"group_kill", case_group_kill},
};

static int play_killed(int argc, char **argv)
{
	argument = argc > 1 ? argv[1] : NULL;
	for (size_t i = 0; argc && i < sizeof(cases) / sizeof(cases[0]); i++)
		if (!strcmp(cases[i].name, argv[0])) {
			cases[i].play();
			return 0;
		}
	return 90;
}

const struct scene killer_scenes[] = {
	{"killed", play_killed},
	{0},
};
