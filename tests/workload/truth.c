// SPDX-License-Identifier: Apache-2.0
// truth SCENE [ARGUMENT]...: see truth.h. Prints {"ready":PID}, waits for a line on standard input, and plays.
#define _GNU_SOURCE
#include "truth.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { LINE_MAX_BYTES = 192 * 1024 };

void die(const char *what)
{
	fprintf(stderr, "truth: %s: %s\n", what, strerror(errno));
	kill(0, SIGKILL); /* the whole group: the harness gives each root one of its own */
	_exit(99);
}

static void write_all(const char *from, size_t size)
{
	while (size > 0) {
		ssize_t done = write(1, from, size);

		if (done < 0 && errno == EINTR)
			continue;
		if (done < 0)
			_exit(98); /* nobody reads any more */
		from += done;
		size -= (size_t)done;
	}
}

void tell(const char *format, ...)
{
	char line[4096];
	va_list args;
	int size;

	va_start(args, format);
	size = vsnprintf(line, sizeof(line) - 1, format, args);
	va_end(args);
	line[size] = '\n';
	write_all(line, (size_t)size + 1);
}

char *quote(char *to, const char *end, const char *text)
{
	*to++ = '"';
	for (; *text && to < end - 8; text++) {
		unsigned char byte = (unsigned char)*text;

		if (byte < 0x20 || byte == '"' || byte == '\\')
			to += sprintf(to, "\\u%04x", byte);
		else
			*to++ = (char)byte;
	}
	*to++ = '"';
	*to = 0;
	return to;
}

void tell_fork(pid_t child)
{
	tell("{\"type\":\"PROCESS_FORK\",\"pid\":%d,\"tid\":%d,\"child_pid\":%d,\"child_tid\":%d}", host_pid(), host_tid(), child, child);
}

void tell_exec_of(pid_t pid, const char *filename, int argc, char **argv)
{
	char *line = malloc(LINE_MAX_BYTES), *end = line + LINE_MAX_BYTES, *at = line;

	at += sprintf(at, "{\"type\":\"PROCESS_EXEC\",\"pid\":%d,\"tid\":%d,\"filename\":", pid, pid);
	at = quote(at, end, filename);
	at += sprintf(at, ",\"args\":[");
	for (int i = 0; i < argc; i++) {
		if (i)
			*at++ = ',';
		at = quote(at, end, argv[i]);
	}
	at += sprintf(at, "]}\n");
	write_all(line, (size_t)(at - line));
	free(line);
}

/* By the new program: the kernel has told it how it was named and with what arguments. */
void tell_exec(int argc, char **argv)
{
	tell_exec_of(host_pid(), (const char *)getauxval(AT_EXECFN), argc, argv);
}

void tell_end(pid_t pid, pid_t tid, int status, const char *more)
{
	char who[96];

	if (tid == OPEN_TID)
		snprintf(who, sizeof(who), "\"pid\":%d", pid);
	else
		snprintf(who, sizeof(who), "\"pid\":%d,\"tid\":%d", pid, tid);
	if (WIFEXITED(status)) {
		tell("{\"type\":\"PROCESS_EXIT\",%s,\"exit_code\":%d,\"core_dumped\":false%s}", who, WEXITSTATUS(status), more);
		return;
	}
	for (int i = 0; i < 2; i++)
		tell("{\"type\":\"PROCESS_%s\",%s,\"exit_signal\":%d,\"core_dumped\":%s%s}", i ? "EXIT" : "ABORT", who, WTERMSIG(status),
		     WCOREDUMP(status) ? "true" : "false", more);
}

int reap(pid_t pid)
{
	char more[64];
	int status;

	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	snprintf(more, sizeof(more), ",\"ppid\":%d", host_pid());
	tell_end(pid, pid, status, more);
	return status;
}

void ended(int fd)
{
	char byte;

	while (read(fd, &byte, 1) > 0)
		;
	close(fd);
}

void wait_word(void)
{
	char byte = 0;

	while (byte != '\n')
		if (read(0, &byte, 1) != 1)
			_exit(97); /* the harness is gone */
}

pid_t told_fork(void)
{
	pid_t child = fork();

	if (child < 0)
		die("fork");
	if (child > 0)
		tell_fork(child);
	return child;
}

static pid_t proc_number(const char *link)
{
	char text[64];
	ssize_t size = readlink(link, text, sizeof(text) - 1);

	if (size < 0)
		die(link);
	text[size] = 0;
	return atoi(strrchr(text, '/') ? strrchr(text, '/') + 1 : text);
}

pid_t host_pid(void)
{
	return proc_number("/proc/self");
}

pid_t host_tid(void)
{
	return proc_number("/proc/thread-self");
}

void exec_end(const char *filename, int code)
{
	char text[16];
	char *argv[] = {"truth", "end", text, NULL};

	snprintf(text, sizeof(text), "%d", code);
	execv(filename, argv);
	die("execv");
}

void nap_ms(int ms)
{
	nanosleep(&(struct timespec){.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}, NULL);
}

int main(int argc, char **argv)
{
	static const struct scene *const acts[] = {family_scenes, exec_scenes, thread_scenes, leader_scenes, signal_scenes, killer_scenes};
	sigset_t none;

	if (argc < 2) {
		fprintf(stderr, "usage: truth SCENE [ARGUMENT]...\n");
		return 2;
	}
	/* What a scene's exec starts: tell of the exec, and end. */
	if (!strcmp(argv[1], "end") && argc >= 3) {
		tell_exec(argc, argv);
		return atoi(argv[2]);
	}
	if (!strcmp(argv[1], "again") && argc >= 4) { /* again N CODE: exec once more, N times */
		char count[16];
		char *next[] = {"truth", "again", count, argv[3], NULL};

		tell_exec(argc, argv);
		if (atoi(argv[2]) == 0)
			return atoi(argv[3]);
		snprintf(count, sizeof(count), "%d", atoi(argv[2]) - 1);
		execv("/proc/self/exe", next);
		die("execv");
	}
	/* Who starts the tests may ignore or block signals (nohup, timeout, a CI's runner), and all that is started inherits it. */
	for (int number = 1; number <= SIGRTMAX; number++)
		signal(number, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	for (size_t act = 0; act < sizeof(acts) / sizeof(acts[0]); act++)
		for (const struct scene *scene = acts[act]; scene->name; scene++)
			if (!strcmp(scene->name, argv[1])) {
				tell("{\"ready\":%d}", host_pid());
				wait_word();
				return scene->play(argc - 2, argv + 2);
			}
	fprintf(stderr, "truth: no scene %s\n", argv[1]);
	return 2;
}
