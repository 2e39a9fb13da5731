// SPDX-License-Identifier: Apache-2.0
// Scenes of exec. The new program tells of it (truth.c, "end" and "again").
#define _GNU_SOURCE
#include "truth.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void exec_child(const char *filename, char **argv)
{
	pid_t child = told_fork();

	if (child == 0) {
		execv(filename, argv);
		die(filename);
	}
	reap(child);
}

static int play_exec(int argc, char **argv)
{
	char name[128];
	char *plain[] = {"truth", "end", "3", NULL};
	char *odd[] = {"another name", "end", "1", "", "two words", "\"quoted\\\"", "line\nfeed", "\t", "k\xc3\xa4se", "bad \xff\xfe bytes", "", NULL};

	(void)argc, (void)argv;
	exec_child("/proc/self/exe", plain);
	exec_child("/proc/self/exe", odd);
	/* A name relative to the working directory. */
	if (symlink("/proc/self/exe", "relative name") && errno != EEXIST)
		die("symlink");
	snprintf(name, sizeof(name), "./relative name");
	exec_child(name, plain);
	unlink("relative name");
	return 0;
}

/* More than a bounded record can hold: a long argument, many arguments, a long file name. */
static int play_exec_long(int argc, char **argv)
{
	static char big[20001], name[3000];
	static char *many[2004];
	char *one[] = {"truth", "end", "0", big, "behind it", NULL};
	char *plain[] = {"truth", "end", "0", NULL};

	(void)argc, (void)argv;
	memset(big, 'x', sizeof(big) - 1);
	exec_child("/proc/self/exe", one);
	many[0] = "truth", many[1] = "end", many[2] = "0";
	for (int i = 3; i < 2003; i++)
		many[i] = "argument";
	exec_child("/proc/self/exe", many);
	for (int i = 0; i < 1400; i++)
		memcpy(name + i * 2, "//", 2);
	strcpy(name + 2800, "proc/self/exe");
	exec_child(name, plain);
	return 0;
}

static int play_exec_chain(int argc, char **argv)
{
	char *chain[] = {"truth", "again", "5", "13", NULL};

	(void)argc, (void)argv;
	exec_child("/proc/self/exe", chain);
	return 0;
}

/* The root itself: no end, the same process. */
static int play_exec_root(int argc, char **argv)
{
	(void)argc, (void)argv;
	exec_end("/proc/self/exe", 14);
}

static int play_exec_fd(int argc, char **argv)
{
	char *plain[] = {"truth", "end", "15", NULL};
	int fd = open("/proc/self/exe", O_RDONLY);
	pid_t child = told_fork();

	(void)argc, (void)argv;
	if (child == 0) {
		fexecve(fd, plain, environ);
		die("fexecve");
	}
	reap(child);
	return 0;
}

/* Each of these fails, and is no event. */
static int play_exec_fails(int argc, char **argv)
{
	char *plain[] = {"x", NULL};
	int fd = open("no program", O_CREAT | O_WRONLY | O_TRUNC, 0644);
	pid_t child;

	(void)argc, (void)argv;
	if (fd < 0 || write(fd, "text", 4) != 4 || close(fd))
		die("no program");
	child = told_fork();
	if (child == 0) {
		if (execv("/does/not/exist", plain) != -1 || errno != ENOENT)
			die("ENOENT expected");
		if (execv("./no program", plain) != -1 || errno != EACCES)
			die("EACCES expected");
		if (chmod("no program", 0755) || execv("./no program", plain) != -1 || errno != ENOEXEC)
			die("ENOEXEC expected");
		_exit(127);
	}
	reap(child);
	unlink("no program");
	return 0;
}

/* A script: the file named is the script, the arguments are those that its interpreter got. */
static int play_exec_script(int argc, char **argv)
{
	static const char text[] = "#!/bin/sh\nread word\nexit 16\n";
	char *call[] = {"script", "one", "two", NULL};
	char line[512], *args[16];
	int fd = open("script", O_CREAT | O_WRONLY | O_TRUNC, 0755);
	int done[2], input[2], count = 0;
	ssize_t size;
	pid_t child;

	(void)argc, (void)argv;
	if (fd < 0 || write(fd, text, sizeof(text) - 1) != sizeof(text) - 1 || close(fd))
		die("script");
	if (pipe2(done, O_CLOEXEC) || pipe(input))
		die("pipe");
	child = told_fork();
	if (child == 0) {
		dup2(input[0], 0);
		close(input[0]);
		close(input[1]);
		execv("./script", call);
		die("execv");
	}
	close(done[1]);
	ended(done[0]); /* closed by the exec */
	snprintf(line, sizeof(line), "/proc/%d/cmdline", child);
	fd = open(line, O_RDONLY);
	size = read(fd, line, sizeof(line));
	close(fd);
	for (char *at = line; at < line + size && count < 16; at += strlen(at) + 1)
		args[count++] = at;
	tell_exec_of(child, "./script", count, args);
	close(input[1]);
	reap(child);
	unlink("script");
	return 0;
}

static void *exec_here(struct worker *worker)
{
	int other = worker->value;

	/* exec ends the others without a signal; the first goes unsaid, since this thread takes its place. */
	tell_thread_end(getpid(), other, 0);
	exec_end("/proc/self/exe", 17);
}

/* exec by a thread that is not the first, in a process with a third. */
static int play_exec_thread(int argc, char **argv)
{
	pid_t child = told_fork();

	(void)argc, (void)argv;
	if (child == 0) {
		struct worker other, executor;

		start_worker(&other, sleep_for_good);
		executor.value = other.tid;
		start_worker(&executor, exec_here);
		for (;;)
			pause();
	}
	reap(child);
	return 0;
}

const struct scene exec_scenes[] = {
	{"exec", play_exec},
	{"exec_long", play_exec_long},
	{"exec_chain", play_exec_chain},
	{"exec_root", play_exec_root},
	{"exec_fd", play_exec_fd},
	{"exec_fails", play_exec_fails},
	{"exec_script", play_exec_script},
	{"exec_thread", play_exec_thread},
	{0},
};
